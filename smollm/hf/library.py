"""transformers, which is imported when it is used."""

from types import ModuleType

from smollm.clash import check_distribution


def load_transformers() -> ModuleType:
    """The package.

    Raises:
        ImportError: it is missing, or Hugging Face's package `kernels` is installed.
    """
    check_distribution()
    try:
        import transformers
    except ModuleNotFoundError as error:
        raise ImportError(
            'transformers: expected it to be installed (pip install -e ".[hf]"), got none'
        ) from error
    return transformers
