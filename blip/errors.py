"""Errors that users can fix. Every message is one sentence that says what is wrong, then the fix."""


class UserError(Exception):
    """Something that a user can fix."""


class ConfigError(UserError):
    """A setting that cannot be used; the message names the variable."""


class BundleError(UserError):
    """A bundle or a checkpoint that cannot be used; the message names the file."""


class InputError(UserError, ValueError):
    """An input that cannot be used; the message names it."""


class ImageError(InputError):
    """An image that cannot be used."""


class FetchError(InputError):
    """An image that cannot be fetched."""
