"""NF4 from its definition equals the table that bitsandbytes computes with."""

import doctest

import pytest

import helpers.budget.nf4
from helpers.budget.nf4 import bits_per_weight, levels, library_levels
from helpers.models import shape


def test_examples_in_docstrings():
    assert doctest.testmod(helpers.budget.nf4, optionflags=doctest.ELLIPSIS).failed == 0


def test_levels_equal_the_library_table():
    assert levels() == pytest.approx(library_levels(), abs=2e-7)


def test_double_quantization_saves_a_third_of_a_gib_on_mistral_7b():
    saved_bits = bits_per_weight(double_quant=False) - bits_per_weight(double_quant=True)
    assert saved_bits * shape("mistral-7b-v0.3").linear_parameters / 8 / 2**30 == pytest.approx(0.303, abs=0.001)
