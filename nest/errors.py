"""Every error this package raises on purpose.

    NestError
    ├── InputError (ValueError)              a file, column, prompt or option that cannot be used
    │   ├── MissingInputError (FileNotFoundError)
    │   ├── NoMemoryError (MemoryError)      no memory for the smallest piece of work
    │   └── NoImprovementError               no step of tuning was better than none
    ├── LayoutError (TypeError)              a model whose neurons we cannot address
    ├── ActivationError (ArithmeticError)    NaN or infinite numbers inside the model
    │   └── TuningStoppedError               the same after some good steps, which it carries
    ├── SelectionError (ValueError)          a selection that is empty, damaged or of another model
    ├── PatchError (ValueError)              a patch that is damaged, of another model, or not applied
    ├── EngineError (RuntimeError)            what answers or judges failed: a server, another library
    └── OutputExistsError (FileExistsError)  an output folder that is already there

Each message says what was wrong, the value found, what was expected and how to mend it. The command
line prints it as one line and exits with code 1.
"""

from typing import Any


class NestError(Exception):
    """Root of the errors that are the caller's to mend."""


class InputError(NestError, ValueError):
    """A file, column, prompt or option that cannot be used."""


class MissingInputError(InputError, FileNotFoundError):
    """A file or folder that is not there."""


class NoMemoryError(InputError, MemoryError):
    """There is no memory even for the smallest piece of the work."""


class NoImprovementError(InputError):
    """No step of tuning lowered the validation loss, so that a patch would change nothing.

    Attributes:
        training: The `Training` that was done all the same.
    """

    def __init__(self, message: str, training: Any) -> None:
        super().__init__(message)
        self.training = training


class LayoutError(NestError, TypeError):
    """A model whose neurons cannot be addressed without a description from the user."""


class ActivationError(NestError, ArithmeticError):
    """NaN or infinite activations, losses or gradients."""


class TuningStoppedError(ActivationError):
    """Tuning met numbers that are not finite after steps that were good.

    Attributes:
        result: The `TuningResult` of the best step before that.
    """

    def __init__(self, message: str, result: Any) -> None:
        super().__init__(message)
        self.result = result


class SelectionError(NestError, ValueError):
    """A selection that is empty, damaged, or belongs to another model."""


class PatchError(NestError, ValueError):
    """A patch that is damaged, belongs to another model, or is not in this model's rows."""


class EngineError(NestError, RuntimeError):
    """An engine or a server that failed: it stalls, drops the connection, or answers nonsense."""


class OutputExistsError(NestError, FileExistsError):
    """An output that exists already and was not to be overwritten."""
