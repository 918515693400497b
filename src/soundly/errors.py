"""Every error soundly raises on purpose.

SoundlyError
├── InvalidInput          an argument of a public call is wrong (also a ValueError)
├── CaptureError          a model cannot be turned into a graph
│   ├── UnsupportedOp     it uses an operation soundly has no rule for
│   ├── DynamicModel      its control flow or shapes depend on the data
│   └── CaptureMismatch   graph and original model disagree: nothing may be proved with it
├── ModelFileError        a model file is broken, hostile or not of the kind its name says
├── MissingRule           an analysis met an operation that lacks the fact it needs
├── EditError             an edit cannot be stated for this model (infeasible edits are results, not errors)
├── DataError             a data set cannot be fetched, or is not what was published
└── CertificateError      a certificate file is damaged or not a certificate

Messages say what is wrong, where (argument, node, file) and what to do about it. An error never becomes a "proved".
"""


class SoundlyError(Exception):
    """Base of every error that soundly raises on purpose."""


class InvalidInput(SoundlyError, ValueError):
    """An argument of a public call is wrong; the message names it and the remedy."""


class CaptureError(SoundlyError):
    """A model cannot be turned into a graph."""


class UnsupportedOp(CaptureError):
    """The model uses an operation that soundly has no rule for."""


class DynamicModel(CaptureError):
    """The model's control flow or shapes depend on the data; a graph has neither."""


class CaptureMismatch(CaptureError):
    """The captured graph and the original model disagree numerically."""


class ModelFileError(SoundlyError):
    """A model file is broken, hostile, or not of the kind its name says."""


class MissingRule(SoundlyError):
    """An analysis met an operation that lacks a fact it needs. A missing rule is never read as zero."""


class EditError(SoundlyError):
    """An edit cannot be stated for this model. An infeasible edit is a result, not an error."""


class DataError(SoundlyError):
    """A data set cannot be fetched or read, or is not what was published."""


class CertificateError(SoundlyError):
    """A certificate file is damaged, tampered with, or not a certificate."""
