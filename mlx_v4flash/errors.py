"""Everything this package raises on purpose, under one root."""


class V4FlashError(Exception):
    """Root of all errors a user can meet; the text says where, expected, found and the next step."""


class ConfigError(V4FlashError):
    """`config.json` is missing, unreadable, of another model, or asks for something we do not compute."""


class CheckpointError(V4FlashError):
    """The checkpoint's files do not hold the model that its config describes."""


class ExpertReadError(V4FlashError):
    """Experts could not be read while a request ran; the model and its other requests live on."""


class ConvertError(V4FlashError):
    """A conversion cannot begin or go on; what is done so far is kept."""


class HubError(V4FlashError):
    """A Hugging Face repository could not be resolved or downloaded."""


class RequestError(V4FlashError, ValueError):
    """A prompt or a parameter of a request cannot be honoured."""


class NumericsError(V4FlashError):
    """The model produced a value that is not a number."""


class DeviceError(V4FlashError):
    """The machine lacks what was asked for."""


class EncodingError(RequestError):
    """A conversation cannot be written as a prompt, or the tokenizer is not one of this model."""
