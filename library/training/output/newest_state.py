"""``--resume latest`` and ``--resume auto``: the newest whole state of a run's name."""

from __future__ import annotations

from library.console import say, warn
from library.errors import UserError
from library.training.output.checkpoints import OutputFolder
from library.training.output.state import SavedState

AUTOMATIC = ("latest", "auto")
"""Values of ``--resume`` that choose a state."""


def newest_state(files: OutputFolder) -> SavedState | None:
    """The state of ``files`` that was written last; those that are not whole are named in a warning."""
    whole: list[SavedState] = []
    for folder in files.states():
        try:
            whole.append(SavedState(folder))
        except UserError as error:
            warn(f"{error} It is passed over.")
    return max(whole, key=lambda state: state.age_key, default=None)


def choose_state(resume: str, files: OutputFolder) -> SavedState | None:
    """The state that ``--resume latest`` or ``--resume auto`` continues; None: a new run begins.

    Raises UserError when ``latest`` finds none.
    """
    saved = newest_state(files)
    named = files.options.output_name
    place = f"{files.folder}" if named is None else f"{named} in {files.folder}"
    if saved is not None:
        say(f"--resume {resume}: continuing from {saved.folder} (step {saved.position.step})")
    elif resume == "latest":
        raise UserError(
            f"--resume latest: there is no whole state of {place}; check --output_dir and --output_name, or begin with "
            "--resume auto, which resumes only if there is one."
        )
    else:
        say(f"--resume auto: there is no state of {place} yet; a new run begins")
    return saved
