"""`python -m helpers.finetune`: one of several processes that train together (workers.py starts them)."""

from helpers.finetune import workers

workers.main()
