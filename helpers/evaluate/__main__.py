"""The process that evaluates one of several models; evaluate/workers.py starts it."""

from helpers.evaluate import evaluate_one, workers

workers.main(evaluate_one)
