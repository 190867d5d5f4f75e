"""Every option of the Stable Diffusion scripts does what it says: short runs of the real trainers in this process."""

from __future__ import annotations

import numpy
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from library.errors import UserError
from library.options import parse_options
from library.training.objective.step_inputs import ItemDraws
from sdxl_train_network import SdxlNetworkTrainer
from tests.e2e.test_flux_training_options import trained_keys
from tests.families.families import TINY
from tests.running import forget_accelerator
from train_network import StableDiffusionNetworkTrainer


def trainer_for(commands: dict, model: str, arguments: tuple) -> StableDiffusionNetworkTrainer:
    forget_accelerator()
    trainer = SdxlNetworkTrainer if model == "sdxl" else StableDiffusionNetworkTrainer
    given = [str(value) for value in (*commands[model], "--max_data_loader_n_workers", "0", *arguments)]
    return trainer.of(parse_options(trainer.options_class, "test", given))


@pytest.fixture
def commands(few_blocks_sd1, few_blocks_sd2, few_blocks_sdxl):
    models = {"sd1": few_blocks_sd1, "sd2": few_blocks_sd2, "sdxl": few_blocks_sdxl}
    yield {name: TINY[name].command(model) for name, model in models.items()}

    forget_accelerator()


@pytest.fixture
def train(commands, dataset_toml, tmp_path):
    """Train a few steps with more options; returns the trainer when it is done."""

    def run(*arguments: object, model="sd1", steps: int = 1, output: str = "out", **dataset: object):
        settings = {"resolution": 64, "bucket_reso_steps": 64, **dataset}
        given = ["--max_train_steps", steps, "--output_dir", tmp_path / output, "--no_report"]
        trainer = trainer_for(commands, model, (*given, "--dataset_config", dataset_toml(**settings), *arguments))
        trainer.train()
        return trainer

    return run


@pytest.fixture
def loras(tmp_path):
    """The tensors of the LoRA files in output folders."""
    return lambda *names: [load_file(tmp_path / name / "last.safetensors") for name in names]


@pytest.fixture(scope="module")
def loaded():
    """The parts of each model that earlier tests of this file have loaded."""
    return {}


@pytest.fixture
def prepare(commands, dataset_toml, tmp_path, loaded):
    """A trainer as it stands when its caches are filled; base models are loaded once for this file."""

    def run(arguments: str, model="sd1", **dataset: object) -> StableDiffusionNetworkTrainer:
        toml = dataset_toml(resolution=64, bucket_reso_steps=64, **dataset)
        given = ("--output_dir", tmp_path, "--dataset_config", toml, *arguments.split())
        trainer = trainer_for(commands, model, given)
        trainer.check_options()
        trainer.prepare_output()
        trainer.start_processes()
        trainer.read_data()
        trainer.open_pipeline()
        trainer.pipeline.modules.update(loaded.setdefault(model, {}))
        trainer.fill_caches()
        return trainer

    yield run


@pytest.fixture
def loss_of(prepare, loaded):
    """The loss of a first batch before anything is learned, which depends on the options and on nothing else."""

    def run(arguments: str, model="sd1", **dataset: object) -> float:
        trainer = prepare(arguments, model, **dataset)
        with torch.no_grad():
            loss = trainer.step_loss(one_batch(trainer), ItemDraws(7, 1, [3, 4])).mean().item()
        loaded[model].update({part: trainer.pipeline.modules[part] for part in trainer.pipeline.parts})
        return loss

    return run


@pytest.fixture(scope="module")
def known_losses() -> dict[tuple[str, str], float]:
    """The losses that ``plain_loss`` has found."""
    return {}


@pytest.fixture
def plain_loss(loss_of, known_losses):
    """``loss_of`` what several cases are compared with."""

    def run(arguments: str, model: str) -> float:
        if (arguments, model) not in known_losses:
            known_losses[arguments, model] = loss_of(arguments, model)
        return known_losses[arguments, model]

    return run


def one_batch(trainer):
    (plan, *_) = trainer.data.train.plan(1, 7)
    return trainer.data.train.load(plan, epoch=1, step=0, max_train_steps=1, seed=7)


# ---- options of noise and loss -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "arguments", "beside"),
    [
        ("sd1", "--noise_offset 0.1", ""),
        ("sd1", "--noise_offset_random_strength", "--noise_offset 0.1"),
        ("sd1", "--adaptive_noise_scale 2", "--noise_offset 0.1"),
        ("sd1", "--multires_noise_iterations 6", ""),
        ("sd1", "--multires_noise_discount 0.8", "--multires_noise_iterations 6"),
        ("sd1", "--ip_noise_gamma 0.1", ""),
        ("sd1", "--ip_noise_gamma_random_strength", "--ip_noise_gamma 0.1"),
        ("sd1", "--min_timestep 900", ""),
        ("sd1", "--max_timestep 100", ""),
        ("sd1", "--loss_type l1", ""),
        ("sd1", "--loss_type smooth_l1", "--loss_type huber"),
        ("sd1", "--huber_schedule exponential", "--loss_type huber"),
        ("sd1", "--huber_c 0.3", "--loss_type huber"),
        ("sd1", "--huber_scale 2", "--loss_type huber"),
        ("sd2", "--zero_terminal_snr", ""),
        ("sd1", "--clip_skip 2", ""),
        ("sd1", "--max_token_length 150", ""),
        ("sdxl", "--max_token_length 225", ""),
        ("sdxl", "--v_parameterization", ""),
    ],
)
def test_an_option_changes_the_loss_of_the_same_draws(loss_of, plain_loss, model, arguments, beside):
    changed = loss_of(f"{beside} {arguments}", model)
    assert numpy.isfinite(changed)
    assert changed != pytest.approx(plain_loss(beside, model), rel=1e-5)


@pytest.mark.parametrize(
    ("model", "arguments", "factor"),
    [
        ("sd1", "--min_snr_gamma 5", lambda snr: min(snr, 5) / snr),
        ("sd1", "--debiased_estimation_loss", lambda snr: snr**-0.5),
        ("sd1", "--v_pred_like_loss 0.5 --min_snr_gamma 1", lambda snr: (1 + 0.5 * (snr + 1) / snr) / snr),
        ("sd2", "--scale_v_pred_loss_like_noise_pred", lambda snr: snr / (snr + 1)),
        ("sd2", "--min_snr_gamma 5 --debiased_estimation_loss", lambda snr: 5 / (snr + 1) ** 2),
    ],
)
def test_loss_weights_are_those_of_the_noise_level(loss_of, plain_loss, model, arguments, factor):
    # alphas_cumprod[100], from the definition of the schedule
    roots = numpy.linspace(0.00085**0.5, 0.012**0.5, 1000)[:101]
    signal = (1 - roots**2).prod()
    fixed = "--min_timestep 100 --max_timestep 100"
    expected = plain_loss(fixed, model) * factor(signal / (1 - signal))
    assert loss_of(f"{fixed} {arguments}", model) == pytest.approx(expected, rel=1e-4)


def test_latents_are_scaled_before_noise_is_added(prepare):
    trainer = prepare("")
    noisy = trainer.objective.noisy_input(torch.full((1, 4, 32, 32), 100.0), ItemDraws(1, 0, [5]), timestep=0)
    assert noisy.latents.mean().item() == pytest.approx(18.215 * (1 - 0.00085) ** 0.5, rel=1e-3)


# ---- other options -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "arguments", "parts"),
    [
        pytest.param(
            "sd1",
            "--mem_eff_attn --highvram --lowram --vae_batch_size 3 --cache_latents",
            {"unet", "te"},
            marks=pytest.mark.thorough,
        ),
        (
            "sd1",
            "--network_args conv_dim=2 conv_alpha=1 rank_dropout=0.1 module_dropout=0.1 --network_dropout 0.1"
            " --network_train_unet_only",
            {"unet"},
        ),
        ("sd1", "--mixed_precision bf16 --full_bf16 --no_half_vae --save_precision fp16 --text_encoder_lr 0", {"unet"}),
        ("sd1", "--scale_weight_norms 0.5 --network_args loraplus_lr_ratio=4 --unet_lr 2e-3", {"unet", "te"}),
        pytest.param(
            "sd2",
            "--validation_split 0.2 --max_validation_steps 1 --optimizer_type Lion",
            {"unet", "te"},
            marks=pytest.mark.thorough,
        ),
        ("sd2", "--gradient_checkpointing --network_train_text_encoder_only --weighted_captions", {"te"}),
        pytest.param(
            "sdxl",
            "--mixed_precision bf16 --gradient_checkpointing --cpu_offload_checkpointing",
            {"unet", "te1", "te2"},
            marks=pytest.mark.thorough,
        ),
        (
            "sdxl",
            "--network_train_text_encoder_only --text_encoder_lr 0 1e-3 --disable_mmap_load_safetensors",
            {"te2"},
        ),
    ],
)
def test_short_run(train, loras, tmp_path, model, arguments, parts):
    trainer = train(*arguments.split(), "--logging_dir", tmp_path / "log", model=model)
    assert trainer.progress.step == 1
    (tensors,) = loras("out")
    assert all(tensor.isfinite().all() for tensor in tensors.values())
    assert trained_keys(tmp_path / "out" / "last.safetensors") == parts


@pytest.mark.thorough
def test_a_compiled_unet_trains(train, loras, images):
    train("--torch_compile", "--dynamo_backend", "eager", "--network_train_unet_only", folder=images)
    (tensors,) = loras("out")
    assert all(tensor.isfinite().all() for tensor in tensors.values())
    assert any(tensor.any() for name, tensor in tensors.items() if "lora_up" in name)


@pytest.mark.parametrize("model", [pytest.param("sd1", marks=pytest.mark.thorough), "sdxl"])
def test_cached_and_uncached_text_train_the_same(train, loras, model):
    arguments = ("--cache_latents", "--network_train_unet_only", "--max_token_length", "150")
    train(*arguments, model=model, output="a")
    train(*arguments, "--cache_text_encoder_outputs", model=model, output="b")
    one, two = loras("a", "b")
    for key, tensor in one.items():
        torch.testing.assert_close(two[key], tensor, rtol=1e-4, atol=1e-6)


def test_another_autoencoder_gives_other_latents(train, few_blocks_sdxl, tmp_path):
    latents = {}
    for name, arguments in (("own", []), ("other", ["--vae", few_blocks_sdxl])):
        trainer = train(*arguments, "--network_train_unet_only", output=name)
        latents[name] = trainer.latents.of(one_batch(trainer), ItemDraws(7, 1, [3, 4]))
    assert not torch.allclose(latents["own"], latents["other"], atol=0.01)
    with safe_open(tmp_path / "other" / "last.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["ss_vae_name"] == few_blocks_sdxl.name and len(metadata["ss_new_vae_hash"]) == 64


# ---- captions and caches -------------------------------------------------------------------------------------------


@pytest.fixture
def images(tmp_path):
    """Two images of their own, whose folder may be written to."""
    folder = tmp_path / "own"
    folder.mkdir()
    for number, size in enumerate([(96, 64), (64, 64)]):
        Image.effect_mandelbrot(size, (-2, -1, 1, 1), 20 + number).convert("RGB").save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text("a (loud:1.5) [quiet] circle", encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("model", "latents", "text", "widths"),
    [
        ("sd1", "0_0096x0064_sd.npz", "0_sd_te.npz", {"hidden_state": (77, 64)}),
        (
            *("sdxl", "0_0096x0064_sdxl.npz", "0_te_outputs.npz"),
            {"hidden_state1": (77, 64), "hidden_state2": (77, 96), "pool2": (80,)},
        ),
    ],
)
def test_cache_files_are_those_of_other_programs(prepare, images, model, latents, text, widths):
    arguments = "--cache_latents_to_disk --cache_text_encoder_outputs_to_disk --network_train_unet_only"
    trainer = prepare(arguments, model, folder=images)
    with numpy.load(images / latents) as file:
        stored = {name: file[name] for name in ("latents", "original_size", "crop_ltrb")}
    assert stored["latents"].shape == (4, 8, 8) and stored["original_size"].tolist() == [96, 64]
    with numpy.load(images / text) as file:
        assert {name: file[name].shape for name in widths} == widths
    # What is stored is drawn from the autoencoder's own distribution, without any factor.
    mean = trainer.pipeline.encode_images(centre_crop(images / "0.png"), None)[0]
    slope = (torch.from_numpy(stored["latents"]) * mean).sum() / mean.pow(2).sum()
    assert 0.5 < slope < 1.5
    written = {path.name: path.read_bytes() for path in images.glob("*.npz")}
    prepare(arguments, model, folder=images)
    assert {path.name: path.read_bytes() for path in images.glob("*.npz")} == written and len(written) == 4


def centre_crop(path) -> torch.Tensor:
    """[1, 3, 64, 64] in -1..1, of an image of 96 x 64."""
    with Image.open(path) as image:
        pixels = numpy.asarray(image.crop((16, 0, 80, 64)), dtype=numpy.float32)
    return torch.from_numpy(pixels / 127.5 - 1).permute(2, 0, 1)[None]


def test_an_old_latent_file_is_used_first(prepare, images):
    size = {"original_size": numpy.array([64, 64]), "crop_ltrb": numpy.zeros(4)}
    for number in range(2):
        numpy.savez(images / f"{number}.npz", latents=numpy.full((4, 8, 8), 50.0, numpy.float32), **size)
    trainer = prepare("--cache_latents_to_disk", folder=images)
    assert not list(images.glob("*_sd.npz"))
    latents = one_batch(trainer).latents
    assert latents is not None and latents.eq(50.0).all()


def test_text_caches_are_made_anew_when_an_option_about_text_changes(prepare, images):
    def stored(arguments: str = "") -> numpy.ndarray:
        prepare(f"--cache_text_encoder_outputs_to_disk --network_train_unet_only {arguments}", folder=images)
        with numpy.load(images / "0_sd_te.npz") as file:
            return file["hidden_state"]

    plain, weighted = stored(), stored("--weighted_captions")
    assert not numpy.allclose(plain[1:4], weighted[1:4])
    assert numpy.array_equal(stored(), plain)
    assert not numpy.allclose(stored("--clip_skip 2"), plain)
    assert stored("--max_token_length 225").shape == (227, 64)


def test_text_caches_of_other_programs_are_taken_as_they_are(prepare, images):
    rng = numpy.random.default_rng(0)
    shapes = {"hidden_state1": (77, 64), "hidden_state2": (77, 96), "pool2": (80,)}
    for number in range(2):
        arrays = {name: rng.standard_normal(shape).astype(numpy.float32) for name, shape in shapes.items()}
        numpy.savez(images / f"{number}_te_outputs.npz", **arrays)
    before = (images / "0_te_outputs.npz").read_bytes()
    arguments = "--cache_text_encoder_outputs_to_disk --network_train_unet_only"
    prepare(arguments, "sdxl", folder=images)
    assert (images / "0_te_outputs.npz").read_bytes() == before
    # Whether theirs were weighted is not known.
    prepare(f"{arguments} --weighted_captions", "sdxl", folder=images)
    assert (images / "0_te_outputs.npz").read_bytes() != before


# ---- SDXL's sizes, output preservation, samples --------------------------------------------------------------------


def test_sdxl_is_told_the_sizes_of_its_images(prepare, images):
    trainer = prepare("", "sdxl", folder=images)
    told = {tuple(row) for row in trainer.conditioning(one_batch(trainer))["time_ids"].tolist()}
    # Height and width of the file; top and left of the crop as cache files have them; height and width of the bucket.
    assert told == {(64, 96, 10, 0, 64, 64), (64, 64, 0, 0, 64, 64)}


@pytest.mark.parametrize("model", [pytest.param("sd1", marks=pytest.mark.thorough), "sdxl"])
def test_only_marked_items_are_kept_at_the_base_model(train, images, model):
    trainer = train("--learning_rate", "1e-2", model=model, folder=images, steps=2)
    batch, draws = one_batch(trainer), ItemDraws(1, 0, [0, 1])
    with torch.no_grad():
        free = trainer.step_loss(batch, draws)
        batch.custom_attributes = [{"diff_output_preservation": True}, {}]
        kept = trainer.step_loss(batch, draws)
        trainer.network.set_multiplier(0.0)
        batch.network_multipliers = [0.0, 0.0]
        exact = trainer.step_loss(batch, draws)
    assert kept[1] == free[1] and 0 < kept[0] != free[0]
    # Without the network, text encoders included, the model's output is the base model's.
    assert exact[0] == 0 < exact[1]


def test_samples_change_nothing_and_have_their_sizes(train, loras, images, tmp_path):
    prompts = tmp_path / "prompts.txt"
    lines = "a cat --w 70 --h 100 --s 2 --d 3 --ss euler_a\n(x) --s 1 --w 64 --h 64 --l 1\n"
    prompts.write_text(lines, encoding="utf-8")
    arguments = ["--cache_latents", "--sample_prompts", prompts, "--sample_every_n_steps", "1"]
    train("--cache_latents", steps=2, output="a", folder=images)
    train(*arguments, "--sample_sampler", "dpmsolver++", steps=2, output="b", folder=images)
    one, two = loras("a", "b")
    assert all(torch.equal(one[key], two[key]) for key in one)
    names = sorted(path.name for path in (tmp_path / "b" / "sample").iterdir())
    assert [name.split("_")[0] for name in names] == ["000001"] * 2 + ["000002"] * 2
    sizes = set()
    for path in (tmp_path / "b" / "sample").iterdir():
        with Image.open(path) as image:
            sizes.add(image.size)
    assert sizes == {(64, 96), (64, 64)}


def test_a_sample_is_drawn_with_the_network_of_that_moment(train, tmp_path, images):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat --w 64 --h 64 --s 2 --d 3\n", encoding="utf-8")
    arguments = ["--sample_prompts", prompts, "--sample_every_n_steps", "1", "--sample_at_first"]
    train(*arguments, "--learning_rate", "0.05", "--cache_text_encoder_outputs", "--network_train_unet_only")
    before, after = (
        next((tmp_path / "out" / "sample").glob(f"{moment}_*.png")).read_bytes() for moment in ("e000000", "000001")
    )
    assert before != after


# ---- learning ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "part",
    [pytest.param("--network_train_unet_only", marks=pytest.mark.thorough), "--network_train_text_encoder_only"],
)
def test_what_is_trained_learns(train, images, part):
    """The text encoder learns only through the U-Net's cross attention."""
    (images / "1.png").unlink()
    trainer = train(part, "--learning_rate", "2e-2", "--cache_latents", steps=16, folder=images, batch_size=1)
    batch = one_batch(trainer)

    def loss(multiplier: float) -> float:
        batch.network_multipliers = [multiplier]
        trainer.network.set_multiplier(multiplier)
        with torch.no_grad():
            draws = [ItemDraws(9, epoch, [0]) for epoch in range(6)]
            return sum(trainer.step_loss(batch, draw).item() for draw in draws)

    assert loss(1.0) < (0.9 if "unet" in part else 0.999) * loss(0.0)


# ---- mistakes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "arguments", "sentence"),
    [
        ("sd1", "--v2", "is a Stable Diffusion 1.x model; leave --v2 out"),
        ("sd1", "--clip_skip 9", "--clip_skip must be between 1 and"),
        ("sd1", "--sample_sampler ddmi", 'not a sampler.*"ddim"'),
        ("sd1", "--cache_text_encoder_outputs", "needs --network_train_unet_only"),
        ("sdxl", "--cache_text_encoder_outputs_to_disk", "needs --network_train_unet_only"),
        ("sdxl", "--v2", "train such a model with train_network.py"),
        ("sd1", "--scale_v_pred_loss_like_noise_pred", "needs --v_parameterization"),
        ("sd2", "--v_pred_like_loss 1", "only one of the two"),
        ("sd1", "--multires_noise_iterations -1", "must not be negative"),
        ("sd1", "--text_encoder_batch_size 0", "must be at least 1"),
        ("sd1", "--mixed_precision bf16 --full_fp16", "needs --mixed_precision fp16"),
    ],
)
def test_mistakes_are_named_before_anything_is_loaded(commands, tmp_path, model, arguments, sentence):
    trainer = trainer_for(commands, model, ("--output_dir", tmp_path, *arguments.split()))
    with pytest.raises(UserError, match=sentence):
        opened(trainer)
    assert not getattr(trainer, "pipeline", None)


def opened(trainer):
    trainer.check_options()
    trainer.prepare_output()
    trainer.start_processes()
    return trainer.make_pipeline()


def test_a_model_for_the_other_script_is_named(commands, tmp_path):
    swapped = {"sd1": commands["sdxl"], "sdxl": commands["sd2"][:-2]}
    for model, sentence in (("sd1", "sdxl_train_network.py"), ("sdxl", "2.x model; train it with train_network.py")):
        with pytest.raises(UserError, match=sentence):
            opened(trainer_for(swapped, model, ("--output_dir", tmp_path)))


def test_what_a_file_says_of_itself_is_heard(commands, tmp_path, caplog):
    caplog.set_level("INFO", logger="library")
    from tools.make_tiny_stable_diffusion import make_tiny_stable_diffusion

    model = make_tiny_stable_diffusion(tmp_path / "v", "sd2", v_prediction=True)
    opened(trainer_for(commands, "sd1", ("--output_dir", tmp_path, "--pretrained_model_name_or_path", model)))
    assert "predicts v, but will be trained to predict noise; add --v_parameterization" in caplog.text
    assert "2.x model: --v2 is taken as given" in caplog.text

    model = make_tiny_stable_diffusion(tmp_path / "xl", "sdxl", v_prediction=True)
    arguments = ("--output_dir", tmp_path, "--pretrained_model_name_or_path", model, "--v_parameterization")
    caplog.clear()
    opened(trainer_for(commands, "sdxl", arguments))
    assert "ends in pure noise; add --zero_terminal_snr" in caplog.text and "add --v_param" not in caplog.text


def test_options_without_effect_are_named(commands, tmp_path, caplog):
    caplog.set_level("INFO", logger="library")
    arguments = "--noise_offset_random_strength --ddp_static_graph --clip_skip 2 --multires_noise_discount 0.5"
    arguments += " --zero_terminal_snr --mem_eff_attn"
    trainer = trainer_for(commands, "sdxl", ("--output_dir", tmp_path, *arguments.split()))
    trainer.check_options()
    assert set(trainer.no_effect) == {
        *("noise_offset_random_strength", "ddp_static_graph", "clip_skip", "multires_noise_discount")
    }
    assert "without --noise_offset: --noise_offset_random_strength" in caplog.text
    assert "meant for v-prediction" in caplog.text
