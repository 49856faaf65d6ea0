"""What a notebook asks of its kernel."""

from minilora.storage.get import find_base


def need_model(name: str):
    """Where the model is not here, says how to get it, and lets every further cell of the notebook do nothing.

    So a notebook ends in a sentence and not in an error, in Jupyter and where it is executed without a reader.
    """
    try:
        find_base(name)
    except FileNotFoundError as error:
        from IPython import get_ipython

        print(f"{error} (93 MB; then restart this notebook, whose further cells now do nothing)")
        if (shell := get_ipython()) is not None:
            shell.input_transformers_cleanup.append(lambda lines: [])
