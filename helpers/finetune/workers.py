"""Several GPUs: a worker process each, started, joined and ended here."""

from helpers.config import RunConfig


def refuse(config: RunConfig) -> None:
    """Raise ValueError for a way of using several GPUs that there is not."""
    if config.train.sharding != "none":
        raise ValueError(
            f"sharding={config.train.sharding} is not there yet: with sharding=none each GPU holds the whole model"
        )
