"""Uploads and states from the hub, against a server on this machine that speaks as the Hugging Face Hub does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from library.errors import UserError
from library.training.output.hub import check_hub_options
from library.training.run_options import HubOptions
from tests.hub_server import ADDRESSES_ARE_READ, HubServer, use_for_programs
from tests.processes import Started


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub that programs started from here take for the real one."""
    with HubServer() as server:
        use_for_programs(server, monkeypatch, tmp_path / "hf_home")
        yield server


PROGRAM = """
import json, sys
from pathlib import Path
from library.errors import UserError
from library.training.output.hub import HubOptions, Uploads, fetch_state
answers = []
for call, path, options in json.loads(sys.argv[1]):
    options = HubOptions(**options)
    try:
        if call == "fetch":
            answers.append(fetch_state(options, path).name)
        else:
            uploads = Uploads(options)
            uploads.prepare()
            uploads.upload(Path(path))
            uploads.finish()
            answers.append("done")
    except UserError as error:
        answers.append(str(error))
Path(sys.argv[2]).write_text(json.dumps(answers))
"""


@pytest.fixture
def run_program(fork_server, hub, tmp_path):
    """Run a program, which takes the hub for the real one, to its end."""

    def run(program: str, *arguments: object) -> Started:
        path = tmp_path / "program.py"
        path.write_text(ADDRESSES_ARE_READ + program, encoding="utf-8")
        ended = fork_server.run(str(path), *arguments)
        assert ended.returncode == 0, ended.output[-2000:]
        return ended

    return run


@pytest.fixture
def with_hub(run_program, tmp_path):
    """What each call (of upload or fetch, with a path and options) answers in a program."""

    def run(*calls: tuple[str, object, dict[str, str]]) -> list[str]:
        given = [(call, str(path), {"huggingface_token": "hf_secret", **options}) for call, path, options in calls]
        run_program(PROGRAM, json.dumps(given), tmp_path / "answers.json")
        return json.loads((tmp_path / "answers.json").read_text())

    return run


def test_repositories_are_private_unless_they_shall_be_public(hub, with_hub, tmp_path):
    file = tmp_path / "cat.safetensors"
    file.write_bytes(b"abc")
    answers = with_hub(
        ("upload", file, {"huggingface_repo_id": "me/hidden"}),
        (
            "upload",
            file,
            {
                "huggingface_repo_id": "me/shown",
                "huggingface_repo_visibility": "public",
                "huggingface_path_in_repo": "/a/b/",
            },
        ),
        (
            "upload",
            file,
            {
                "huggingface_repo_id": "me/images",
                "huggingface_repo_visibility": "private",
                "huggingface_repo_type": "dataset",
            },
        ),
        ("upload", file, {"huggingface_repo_id": "me/room", "huggingface_repo_type": "space"}),
        (
            "upload",
            file,
            {
                "huggingface_repo_id": "me/hidden",
                "huggingface_repo_visibility": "public",
                "huggingface_path_in_repo": "again",
            },
        ),
    )
    assert answers == ["done"] * 5
    assert hub.visibility == {
        **{"me/hidden": "private", "me/shown": "public"},
        **{"datasets/me/images": "private", "spaces/me/room": "private"},
    }
    assert hub.repositories == {
        "me/hidden": {"cat.safetensors": b"abc", "again/cat.safetensors": b"abc"},
        "me/shown": {"a/b/cat.safetensors": b"abc"},
        "datasets/me/images": {"cat.safetensors": b"abc"},
        "spaces/me/room": {"cat.safetensors": b"abc"},
    }


def test_what_the_hub_refuses_is_one_sentence(hub, with_hub, monkeypatch):
    hub.repositories["me/lora"] = {"a/cat-state/train_state.json": b"{}", "other.txt": b""}
    wrong_token, no_state, no_repository, state = with_hub(
        ("upload", "x", {"huggingface_repo_id": "me/lora", "huggingface_token": "hf_wrong"}),
        ("fetch", "me/lora/a/dog-state", {}),
        ("fetch", "me/nothing/a/cat-state", {}),
        ("fetch", "me/lora/a/cat-state:main:model", {}),
    )
    assert wrong_token.startswith("--huggingface_repo_id me/lora: ") and "Invalid credentials" in wrong_token
    assert no_state == "--resume me/lora/a/dog-state: there is no folder a/dog-state in me/lora."
    assert no_repository.startswith("--resume me/nothing/a/cat-state: ") and "Repository Not Found" in no_repository
    assert state == "cat-state"
    assert hub.refused[0] == "/api/repos/create"
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    (nobody,) = with_hub(("upload", "x", {"huggingface_repo_id": "me/lora"}))
    assert nobody.startswith("--huggingface_repo_id me/lora: ")


@pytest.mark.parametrize(
    ("options", "resume", "sentence"),
    [
        ({"huggingface_repo_id": "lora"}, None, "--huggingface_repo_id must be owner/name, not lora"),
        ({"huggingface_repo_id": "a/b/c"}, None, "--huggingface_repo_id must be owner/name"),
        ({"huggingface_repo_type": "modle"}, None, "--huggingface_repo_type must be one of model, dataset, space"),
        ({"resume_from_huggingface": True}, None, "--resume_from_huggingface needs --resume"),
        ({"resume_from_huggingface": True}, "me/lora", "is named owner/name/path"),
        ({"resume_from_huggingface": True}, "me/lora/state:main:modle", "is named owner/name/path"),
    ],
)
def test_mistakes_are_named_without_the_hub(options, resume, sentence):
    with pytest.raises(UserError, match=sentence):
        check_hub_options(HubOptions(**options), resume)


def test_a_misspelt_visibility_keeps_a_repository_private(caplog):
    check_hub_options(HubOptions(huggingface_repo_id="a/b", huggingface_repo_visibility="pubilc"), None)
    assert "--huggingface_repo_visibility pubilc: a new repository is made private" in caplog.text


TRAINING = """
import json, sys
from accelerate.state import AcceleratorState, GradientState, PartialState
from library.console import set_up_console
from library.options import parse_options
from train_network import StableDiffusionNetworkTrainer, StableDiffusionTrainingOptions
for arguments in json.loads(sys.argv[1]):
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    options = parse_options(StableDiffusionTrainingOptions, "test", arguments)
    set_up_console(options.console)
    StableDiffusionNetworkTrainer(options).train()
"""


def test_a_run_uploads_in_the_background_and_another_goes_on_from_there(
    hub, run_program, sd1_command, dataset_toml, tmp_path
):
    common = [*sd1_command, "--dataset_config", dataset_toml(resolution=64, bucket_reso_steps=64)]
    common += ["--network_train_unet_only", "--max_train_steps", "4", "--huggingface_token", hub.token, "--no_report"]
    first = [*common, "--output_dir", tmp_path / "a", "--save_every_n_steps", "2", "--save_state", "--async_upload"]
    first += ["--huggingface_repo_id", "me/lora", "--huggingface_path_in_repo", "loras", "--save_state_to_huggingface"]
    second = [*common, "--output_dir", tmp_path / "b", "--resume", "me/lora/loras/at-step00000002-state"]
    # The hub takes nothing before the first run is at its end, and one file never.
    hub.hold = (tmp_path / "a" / "at-step00000004-state").is_dir
    hub.unwanted = "at-step00000004.safetensors"
    given = json.dumps([[str(value) for value in run] for run in (first, [*second, "--resume_from_huggingface"])])
    said = run_program(TRAINING, given).output
    assert "at-step00000004.safetensors could not be uploaded" in said and "Traceback" not in said
    written = {p.relative_to(tmp_path / "a").as_posix(): p for p in (tmp_path / "a").rglob("*") if p.is_file()}
    expected = {f"loras/{name}": path.read_bytes() for name, path in written.items() if name != hub.unwanted}
    assert hub.repositories["me/lora"] == expected and "loras/last-state/train_state.json" in expected
    assert hub.visibility["me/lora"] == "private" and hub.most_at_once == 1
    assert "step 2, epoch 1" in said
    assert {path.name for path in (tmp_path / "b").iterdir()} == {"last.safetensors"}
    one, two = (load_file(Path(tmp_path, name, "last.safetensors")) for name in "ab")
    assert all((two[key] == tensor).all() for key, tensor in one.items())
