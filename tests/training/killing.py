"""A run that ends in the middle of step 8, as if its process were killed."""

from training import loop


class Killed(BaseException):
    """Stands for kill -9: nothing in the program handles it."""


def kill_at_eight(metrics: loop.Metrics) -> None:
    if metrics["step"] == 8:
        raise Killed
