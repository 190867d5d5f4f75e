"""Find a text encoder's tokenizer: with the user's files first, from the hub last.

The order: ``--tokenizer_cache_dir``, files beside the checkpoint, a ``spiece_model`` in the checkpoint, what ships with
this program, and the Hugging Face hub, which is announced.
"""

from __future__ import annotations

import gzip
import json
import logging
import shutil
import tempfile
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from library.checkpoints import Checkpoint
from library.errors import UserError
from library.lean_imports import prepare_transformers, transformers_class
from library.models.clip_tokenizer import ClipTokenizer, clip_tokenizer

logger = logging.getLogger(__name__)

CACHE_OPTION = "--tokenizer_cache_dir"
SHIPPED = Path(__file__).parent / "tokenizers"


class Tokenizer(Protocol):
    """What is used of a tokenizer, whether it is transformers' or a ``ClipTokenizer``."""

    bos_token_id: Any
    eos_token_id: Any
    pad_token_id: Any

    def __len__(self) -> int: ...

    def get_vocab(self) -> dict[str, int]:
        """The ids of all entries."""

    @property
    def __call__(self) -> Any:
        """As transformers documents it: texts in, something with ``input_ids`` and ``attention_mask`` out."""


@dataclass(frozen=True)
class TokenizerKind:
    """A kind of tokenizer: its hub id, the folders where Diffusers puts it, and how its files are recognised.

    ``pad_id`` is what the text encoder was trained to see after the end of text; None leaves it to the files.
    """

    family: Literal["clip", "t5", "gemma", "qwen"]
    hub_id: str
    folders: tuple[str, ...]
    files: tuple[str, ...]
    json_model: str
    pad_id: int | None = None

    @property
    def folder_name(self) -> str:
        """Its folder's name inside ``--tokenizer_cache_dir``."""
        return self.hub_id.replace("/", "_")


BPE_FILES = ("vocab.json", "merges.txt")
CLIP_L = TokenizerKind("clip", "openai/clip-vit-large-patch14", ("tokenizer",), BPE_FILES, "BPE")
# OpenCLIP's models were trained with zeros after the end of text, which is "!". Their folders on the hub disagree.
CLIP_H = TokenizerKind("clip", "stabilityai/stable-diffusion-2", ("tokenizer",), BPE_FILES, "BPE", pad_id=0)
CLIP_BIG_G = TokenizerKind(
    "clip", "laion/CLIP-ViT-bigG-14-laion2B-39B-b160k", ("tokenizer_2",), BPE_FILES, "BPE", pad_id=0
)
T5_XXL = TokenizerKind("t5", "google/t5-v1_1-xxl", ("tokenizer_2", "tokenizer"), ("spiece.model",), "Unigram")
GEMMA_2 = TokenizerKind("gemma", "google/gemma-2-2b", ("tokenizer",), ("tokenizer.model",), "BPE", pad_id=0)
QWEN2_5_VL = TokenizerKind("qwen", "Qwen/Qwen2.5-VL-7B-Instruct", ("tokenizer",), BPE_FILES, "BPE")
GEMMA_SPECIAL = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>", "unk_token": "<unk>"}
"""Gemma's special tokens, which are the first of its vocabulary."""
QWEN_SPECIAL = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>"),
    *("<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>"),
    *("<|image_pad|>", "<|video_pad|>"),
)
QWEN_ADDED = (
    *("<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>"),
    *("<|repo_name|>", "<|file_sep|>"),
)
"""What Qwen2.5's tokenizer has behind its vocab.json: special tokens, then words that are never split."""
TOKENIZER_CLASSES = {
    "clip": ("clip.tokenization_clip", "CLIPTokenizer"),
    "t5": ("t5.tokenization_t5", "T5Tokenizer"),
    "gemma": ("gemma.tokenization_gemma", "GemmaTokenizer"),
    "qwen": ("qwen2.tokenization_qwen2", "Qwen2Tokenizer"),
}
"""transformers' module and class for each family."""
EMBEDDED = ("spiece_model", "text_encoders.spiece_model")
"""Under which keys checkpoints hold a sentencepiece model."""


def load_tokenizer(
    kind: TokenizerKind, checkpoint: Checkpoint, vocabulary: int, cache_dir: Path | str | None = None
) -> Tokenizer:
    """The tokenizer for a text encoder with ``vocabulary`` rows in its embedding table.

    Raises UserError when the tokenizer has more entries than that, and when there is none, saying what to give.
    """
    tokenizer, origin = _find(kind, checkpoint, vocabulary, Path(cache_dir) if cache_dir else None)
    if len(tokenizer) > vocabulary:
        raise UserError(
            f"The tokenizer from {origin} has {len(tokenizer):,} entries, but {checkpoint.label} has embeddings for "
            f"only {vocabulary:,}; put the tokenizer that belongs to it beside it, or into {CACHE_OPTION} as a folder "
            f"named {kind.folder_name}."
        )
    if kind.pad_id is not None:
        tokenizer.pad_token_id = kind.pad_id
    if not isinstance(tokenizer, ClipTokenizer):
        tokenizer.padding_side = tokenizer.truncation_side = "right"  # whatever a folder says for generating text
    return tokenizer


def _find(kind: TokenizerKind, checkpoint: Checkpoint, vocabulary: int, cache_dir: Path | None) -> tuple[Any, str]:
    """The tokenizer and, for messages, where it comes from."""
    if cache_dir is not None and (cache_dir / kind.folder_name).is_dir():
        folder = cache_dir / kind.folder_name
        if not holds(kind, folder):
            raise UserError(
                f"{CACHE_OPTION}: {folder} holds no {' + '.join(kind.files)} or tokenizer.json of {kind.hub_id}."
            )
        return _from_folder(kind, folder, vocabulary), str(folder)
    for folder in _neighbours(kind, checkpoint.path):
        if holds(kind, folder):
            return _from_folder(kind, folder, vocabulary), str(folder)
    embedded = next((key for key in EMBEDDED if key in checkpoint), None)
    if kind.family in ("t5", "gemma") and embedded is not None:
        return _from_embedded(kind, checkpoint, embedded, vocabulary), f"the checkpoint {checkpoint.path}"
    if kind.family == "clip":
        return _shipped_clip(), "this program (OpenAI's CLIP vocabulary)"
    return _from_hub(kind, checkpoint, vocabulary, cache_dir), f"the hub ({kind.hub_id})"


def holds(kind: TokenizerKind, folder: Path) -> bool:
    """Whether ``folder`` holds a tokenizer of this kind, and not one of another kind under the same file names."""
    tokenizer_json = folder / "tokenizer.json"
    has_files = all((folder / name).is_file() for name in kind.files)
    if kind.family == "gemma" and has_files and _is_gemmas(folder):
        return True
    if kind.family == "qwen" and has_files and _whose(_json(folder / "vocab.json")) == "qwen":
        return True
    if tokenizer_json.is_file():
        content = _json(tokenizer_json)
        try:
            model, added = content["model"], [token["content"] for token in content.get("added_tokens", ())]
            is_bpe = model["type"] == "BPE"
            return model["type"] == kind.json_model and (not is_bpe or _whose(model["vocab"], added) == kind.family)
        except (LookupError, TypeError, AttributeError):
            raise UserError(f"{tokenizer_json} is not a valid tokenizer file.") from None
    return has_files and (kind.family == "t5" or kind.family == "clip" == _whose(_json(folder / "vocab.json")))


def _whose(vocabulary: dict[str, int], added: Collection[str] = QWEN_SPECIAL) -> str:
    """To which family a vocabulary of byte pairs belongs, with the tokens that are ``added`` to it."""
    if "a</w>" in vocabulary:  # of those known here, only CLIP's marks the ends of words
        return "clip"
    if not GEMMA_SPECIAL.values() - vocabulary.keys():
        return "gemma"
    # Qwen's special tokens stand outside; GPT-2's, for one, is in its vocabulary
    return "qwen" if QWEN_SPECIAL[1] in added and QWEN_SPECIAL[0] not in vocabulary else "another"


def _json(path: Path) -> dict[str, Any]:
    """The content of a tokenizer's file. Raises UserError where it isn't a JSON object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a valid tokenizer file.")
    return content


def _is_gemmas(folder: Path) -> bool:
    """Whether the ``tokenizer.model`` in a folder is Gemma's; other language models have files of that name.

    Such a file begins with its first pieces. To read all 256,000 takes a second.
    """
    with open(folder / "tokenizer.model", "rb") as file:
        beginning = file.read(100)
    places = [beginning.find(piece.encode()) for piece in GEMMA_SPECIAL.values()]
    return -1 not in places and places == sorted(places)


def _neighbours(kind: TokenizerKind, path: Path) -> Iterator[Path]:
    """Folders beside a checkpoint: Diffusers' tokenizer folders, in it or next to it, then its own folder."""
    for place in (path, path.parent, path.parent.parent):
        yield from (place / name for name in kind.folders)
        if place == path.parent and not path.parent.name.startswith("text_encoder"):
            break  # one level further up only in a Diffusers folder, where the tokenizers stand beside text_encoder/
    yield path if path.is_dir() else path.parent


def _from_folder(kind: TokenizerKind, folder: Path, vocabulary: int) -> Any:
    if kind.family in ("clip", "t5") and _belongs_to_another(kind, folder):
        return _from_files_alone(kind, folder, vocabulary)
    arguments: dict[str, Any] = {}
    try:
        if kind.family == "clip":
            plain = clip_tokenizer(folder)
            if plain is not None:
                return plain
        if kind.family == "gemma":
            return _gemma(folder)
        if kind.family == "qwen":
            return _qwen(folder)
        if kind.family == "t5" and not (folder / "tokenizer.json").is_file():
            arguments["extra_ids"] = _sentinels(folder, vocabulary)
        tokenizer = _tokenizer_class(kind).from_pretrained(str(folder), local_files_only=True, **arguments)
        return _with_pad_word_in_text(tokenizer) if kind.family == "clip" else tokenizer
    except Exception as error:  # the tokenizers library raises bare Exception for damaged files
        raise UserError(f"The tokenizer in {folder} cannot be read: {str(error).splitlines()[0]}") from error


def _belongs_to_another(kind: TokenizerKind, folder: Path) -> bool:
    """Whether a folder has, beside this kind's files, others that transformers would rather take.

    Those are the configuration of another kind and another model's ``tokenizer.model``.
    """
    config, others = folder / "tokenizer_config.json", {"clip", "t5", "gemma", "qwen"} - {kind.family}
    if not all((folder / name).is_file() for name in kind.files):
        return False
    if "tokenizer.model" not in kind.files and (folder / "tokenizer.model").is_file():
        return True
    if not config.is_file():
        return False
    try:
        name = str(json.loads(config.read_text(encoding="utf-8"))["tokenizer_class"]).lower()
        return any(other in name for other in others)
    except (ValueError, LookupError, TypeError, RecursionError):
        return False


def _from_files_alone(kind: TokenizerKind, folder: Path, vocabulary: int) -> Any:
    with tempfile.TemporaryDirectory() as place:
        for name in kind.files:
            shutil.copy(folder / name, place)
        return _from_folder(kind, Path(place), vocabulary)


def _with_pad_word_in_text(tokenizer: Any) -> Any:
    """The tokenizer, padding with the end of text where its pad token is a character that texts have.

    Stable Diffusion 2's and XL's folders name "!". As a special token it would cut every text at "!" and give other ids
    than the text encoder was trained on.
    """
    if len(tokenizer.pad_token or "") != 1:
        return tokenizer
    from tokenizers import Tokenizer
    from transformers.tokenization_utils_tokenizers import PreTrainedTokenizerFast

    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] != tokenizer.pad_token]
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)),
        bos_token=tokenizer.bos_token,
        eos_token=tokenizer.eos_token,
        unk_token=tokenizer.unk_token,
        pad_token=tokenizer.eos_token,
        model_max_length=tokenizer.model_max_length,
    )


def _sentinels(folder: Path, vocabulary: int) -> int:
    """How many sentinel tokens T5 has after its pieces: 100, unless a small vocabulary has no room for them."""
    import sentencepiece

    config = folder / "tokenizer_config.json"
    if config.is_file():
        configured = _json(config).get("extra_ids")
        if configured is not None and type(configured) is not int:
            raise UserError(f"{config} is not a valid tokenizer file: extra_ids must be a whole number.")
        if configured is not None:
            return configured
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "spiece.model")).vocab_size()
    return 100 if pieces + 100 <= vocabulary else 0


def _from_embedded(kind: TokenizerKind, checkpoint: Checkpoint, key: str, vocabulary: int) -> Any:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        (folder / kind.files[0]).write_bytes(checkpoint.load(key).numpy().tobytes())
        tensor = f'{checkpoint.label}: the tokenizer in its tensor "{key}"'
        try:
            if kind.family == "gemma" and not _is_gemmas(folder):
                raise UserError(f"{tensor} is not Gemma's.")
            return _from_folder(kind, folder, vocabulary)
        except UserError as error:
            raise UserError(str(error).replace(f"The tokenizer in {folder}", tensor)) from None


def _gemma(folder: Path) -> Any:
    """Gemma's tokenizer from a sentencepiece model or tokenizer.json, whatever else stands in the folder.

    The former is left to sentencepiece itself: to convert 256,000 pieces takes transformers' own class ten seconds.
    """
    model = folder / "tokenizer.model"
    if model.is_file() and _is_gemmas(folder):
        prepare_transformers()
        from transformers.tokenization_utils_sentencepiece import SentencePieceBackend

        return SentencePieceBackend(vocab_file=str(model), special_tokens_pattern="bos", **GEMMA_SPECIAL)
    with tempfile.TemporaryDirectory() as place:
        shutil.copy(folder / "tokenizer.json", place)
        return _tokenizer_class(GEMMA_2).from_pretrained(place, local_files_only=True, add_bos_token=True)


def _qwen(folder: Path) -> Any:
    """Qwen's tokenizer from vocab.json and merges.txt, or tokenizer.json, whatever else stands in the folder."""
    from tokenizers import AddedToken

    if not all((folder / name).is_file() for name in BPE_FILES) or _whose(_json(folder / "vocab.json")) != "qwen":
        with tempfile.TemporaryDirectory() as place:
            shutil.copy(folder / "tokenizer.json", place)
            return _tokenizer_class(QWEN2_5_VL).from_pretrained(place, local_files_only=True)
    lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
    merges = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
    tokenizer = _tokenizer_class(QWEN2_5_VL)(vocab=_json(folder / "vocab.json"), merges=merges)
    for names, is_special in ((QWEN_SPECIAL, True), (QWEN_ADDED, False)):
        tokenizer.add_tokens([AddedToken(name, special=is_special, normalized=False) for name in names])
    return tokenizer


def _shipped_clip() -> ClipTokenizer:
    text = gzip.decompress((SHIPPED / "clip" / "merges.txt.gz").read_bytes()).decode("utf-8")
    merges = [(first, second) for first, second in (line.split(" ") for line in text.splitlines())]
    bytes_as_characters = byte_characters()
    entries = bytes_as_characters + [character + "</w>" for character in bytes_as_characters]
    entries += ["".join(pair) for pair in merges] + ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {entry: index for index, entry in enumerate(entries)}
    return ClipTokenizer(vocabulary, merges)


def byte_characters() -> list[str]:
    """The 256 characters that stand for bytes in byte-level BPE, in the order of CLIP's vocabulary."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [chr(byte) for byte in printable] + [chr(256 + index) for index in range(256 - len(printable))]


def _from_hub(kind: TokenizerKind, checkpoint: Checkpoint, vocabulary: int, cache_dir: Path | None) -> Any:
    """Fetch the files ourselves: without them, transformers' own ``from_pretrained`` makes an empty tokenizer."""
    from huggingface_hub import snapshot_download

    logger.info("No tokenizer %s beside the checkpoint: asking the Hugging Face hub (or its local cache).", kind.hub_id)
    patterns = [*kind.files, "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"]
    try:
        folder = Path(snapshot_download(kind.hub_id, allow_patterns=patterns))
    except (OSError, ValueError) as error:
        raise UserError(
            f"The tokenizer {kind.hub_id} is neither beside the checkpoint ({checkpoint.path}) nor to be had from the "
            f"Hugging Face hub; put its {' and '.join(kind.files)} (or tokenizer.json) into a folder named "
            f"{kind.folder_name}, and give the folder above that as {CACHE_OPTION}{_instead(kind)}."
        ) from error
    if not holds(kind, folder):
        raise UserError(f"The Hugging Face hub gave no {' and '.join(kind.files)} for {kind.hub_id} (in {folder}).")
    tokenizer = _from_folder(kind, folder, vocabulary)
    if cache_dir is not None:
        tokenizer.save_pretrained(str(cache_dir / kind.folder_name))
        logger.info("Saved the tokenizer to %s.", cache_dir / kind.folder_name)
    return tokenizer


def _instead(kind: TokenizerKind) -> str:
    """What else a user can do who has no tokenizer."""
    return ', or take a checkpoint that holds its tokenizer (a tensor "spiece_model")' if kind.family == "gemma" else ""


def _tokenizer_class(kind: TokenizerKind) -> Any:
    return transformers_class(*TOKENIZER_CLASSES[kind.family])
