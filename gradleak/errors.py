"""The errors a user can cause or meet, each with the mend and the exit code it stands for."""


class GradleakError(Exception):
    """Something went wrong that has a defined answer: one line, what is wrong and what to do."""

    exit_code = 1

    def __init__(self, wrong: str, mend: str = "") -> None:
        """Join what is ``wrong`` and its ``mend`` into one line."""
        self.wrong = wrong
        self.mend = mend
        super().__init__(f"{wrong}; {mend}" if mend else wrong)


class UsageError(GradleakError):
    """The call itself is off: options that contradict each other, an unknown name."""

    exit_code = 2


class InputError(GradleakError):
    """The input is broken or of a kind that no attack here applies to."""

    exit_code = 3


class IncompleteError(GradleakError):
    """The attack was tried, or could not start for want of an earlier stage's answer."""

    exit_code = 4
