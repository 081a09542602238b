"""Tables: each kind of rows, and text that must not become HTML."""

import doctest

import helpers.show.tables
from helpers import budget
from helpers.show import tables
from helpers.show.tables import table


def test_examples_in_docstrings():
    assert doctest.testmod(helpers.show.tables).failed == 0


def test_template_tokens_are_shown_and_not_rendered():
    html = table([("template", "<s>[INST]")]).to_html()
    assert "&lt;s&gt;[INST]" in html
    assert "<s>" not in html


def test_rows_of_every_kind():
    assert list(table([{"a": 1, "b": 2.5}]).data.columns) == ["a", "b"]
    assert list(table([("x", 1)], columns=("name", "n")).data.columns) == ["name", "n"]
    assert table([]).data.empty


def test_what_finetune_and_merge_measure_has_a_name_for_people():
    """Keys as the stages write them; a zero for a GPU that is not there is no measurement."""
    figures = {"loss_first": 2.0, "steps": 180, "peak_reserved_gib": 0.0, "resumed_from_step": 0, "heldout_loss": None}
    assert tables.measured(figures) == [("loss at the first step", 2.0), ("optimizer steps", 180)]
    assert not any("_" in label for label in tables.LABELS.values())
    assert all(len(tables.measured({name: 1})) == 1 for name in tables.LABELS)


def test_what_is_measured_and_not_predicted_has_its_row():
    rows = [{"quantity": "step, s"} | budget.compared(0.1, 0.5, known) for known in (True, False)]
    assert tables.columns_of(rows).splitlines()[1:] == [
        "step, s   0.1           0.5       -80",
        "step, s   on GPUs only  0.5       –",
    ]
    assert "on GPUs only" in table(rows).to_html()


def test_a_column_in_which_nothing_stands_is_left_out():
    rows = [{"quantity": "step, s"} | budget.compared(0.1, 0.5, known=False)]
    assert list(table(rows).data.columns) == ["quantity", "predicted", "measured"]
    assert list(table([*rows, {"quantity": "RAM, GiB"} | budget.compared(0.1, 0.5)]).data.columns)[-1] == "difference %"


def test_a_path_may_go_on_in_a_new_line_and_a_table_of_errors_has_one_line_of_headings():
    assert "data/<wbr>conversations.<wbr>jsonl" in table({"source": "/home/data/conversations.jsonl"}).to_html()
    modules = [{"layer": layer, "module": f"model.layers.{layer}.q_proj", "error": 1e-5} for layer in (0, 1)]
    html = tables.errors([module | {"module": "mlp.up_proj"} for module in modules] + [modules[0]]).to_html()
    assert html.count("<tr>") == 3 and ">layer<" in html and ">1.0e-05<" in html and ">–<" in html


def test_what_is_not_known_is_empty_beside_numbers_and_whole_numbers_stay_whole():
    html = tables.table([{"predicted": 4096, "off": -87.94}, {"predicted": "on GPUs only", "off": None}]).to_html()
    assert "nan" not in html and "None" not in html
    assert "4,096" in html and "-87.94" in html
    assert "4,096" in tables.table([{"context": 4096}, {"context": None}]).to_html()
