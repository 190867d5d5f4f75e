"""A run starts without transformers, torch's compiler and what it does not use of diffusers; all can be used later."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from tests.families.families import TINY

ROOT = Path(__file__).parents[2]
HEAVY = (
    "torch._dynamo.eval_frame",
    "torch._inductor",
    "sympy",
    "scipy",
    "bitsandbytes",
    "peft",
    "networkx",
    "torchvision",
)
UNUSED = ("transformers", "huggingface_hub.hf_api", "huggingface_hub.file_download", "requests", "diffusers.quantizers")
MODELS = ("transformers.modeling_utils", "diffusers.models.transformers.transformer_flux", "diffusers.hooks.hooks")
ENCODERS = [("clip.modeling_clip", "CLIPTextModel"), ("t5.modeling_t5", "T5EncoderModel")]
ENCODERS += [("gemma2.modeling_gemma2", "Gemma2Model")]
UNUSED_BY_ENCODERS = (
    "torch._dynamo.eval_frame",
    "torch._inductor",
    "torch.distributed.tensor",
    "torch.distributed.fsdp",
    "sympy",
)
UNUSED_BY_ENCODERS += ("scipy", "peft", "bitsandbytes", "transformers.core_model_loading")
TRAIN = """
import sys
from tests.running import run_in_process, train
for family, arguments in {arguments!r}.items():
    train(family, *arguments)
print("TRAINED", sorted(set({heavy!r}) & set(sys.modules)))
drawn = run_in_process("gen_img.py", *{drawing!r})
assert drawn.returncode == 0, drawn.stderr
print("DRAWN", sorted(set({heavy!r}) & set(sys.modules)))
train("lumina", *{prompts_read!r})
print("READ", [name for name in ("transformers", "transformers.models") if "__all__" in vars(sys.modules[name])])
from library.lean_imports import transformers_class
for module, name in {encoders!r}:
    transformers_class(module, name)
print("ENCODERS", sorted(set({unused_by_encoders!r}) & set(sys.modules)))
import torch
from library.training.optim.optimizers import OptimizerOptions, check_optimizer_options, create_optimizer
for name in ("Prodigy", "AdamW8bit", "Adafactor"):
    options = OptimizerOptions(optimizer_type=name)
    check_optimizer_options(options)
    create_optimizer(options, [torch.nn.Parameter(torch.zeros(2, 2))])
from library.memory.nf4 import quantise
quantise(torch.ones(2, 2))
print("OPTIMIZERS", sorted({{"torch._dynamo.eval_frame", "torch._inductor", "sympy", "scipy"}} & set(sys.modules)))
"""
COMPILE = """
from torch.utils.checkpoint import checkpoint
@torch.compiler.disable
def kept_out(x): return x.cos()
@torch.compiler.allow_in_graph
def allowed(x): return x.tan()
@torch.compiler.assume_constant_result
def constant(): return 3
steps = [lambda x: allowed(x.sin()) * constant(), lambda x: kept_out(x.sin()) * constant()]
x = torch.ones(2, requires_grad=True)
expected = [checkpoint(step, x, use_reentrant=False) for step in steps]
expected[0].sum().backward()
assert "torch._dynamo.eval_frame" not in sys.modules
import torch._dynamo.eval_frame as part
assert part is torch._dynamo.eval_frame is sys.modules["torch._dynamo.eval_frame"]
assert part.OptimizedModule is torch._dynamo.OptimizedModule and part.__spec__.origin == part.__file__
graphs = []
def note(graph, inputs):
    graphs.append([node.target for node in graph.graph.nodes if node.op.startswith("call")])
    return graph.forward
for step, result in zip(steps, expected):
    assert torch.equal(torch.compile(step, backend=note)(x), result)
    assert torch.equal(checkpoint(step, x, use_reentrant=False), result)
assert [len(graph) for graph in graphs] == [3, 1, 1] and graphs[0][1] is allowed and graphs[1] == ["sin"], graphs
print("COMPILED")
from library.lycoris import open_lycoris
open_lycoris()
from lycoris.modules import base
assert not isinstance(torch.nn.Linear(2, 2), base.BaseTunerLayer)
print("LYCORIS", sorted({"peft", "scipy.optimize"} & set(sys.modules)))
"""
USE = """
import tempfile
import diffusers.models.unets
import torch
from diffusers import FluxTransformer2DModel, UNet2DConditionModel, StableDiffusionXLPipeline
from diffusers.hooks import apply_layerwise_casting
from diffusers.loaders import lora_base
from diffusers.models.transformers import SanaTransformer2DModel
from diffusers.quantizers.bitsandbytes import utils as quantizers
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler
import diffusers.models.unets.unet_2d_condition as again
import bitsandbytes, peft, scipy.stats, transformers.models
from transformers import BertModel, CLIPTextModel, CLIPTokenizer
assert again.UNet2DConditionModel is UNet2DConditionModel is diffusers.models.unets.UNet2DConditionModel
assert transformers.models.clip.CLIPTokenizer is CLIPTokenizer and transformers.models.bert.BertModel is BertModel
assert quantizers.bnb.nn.Linear4bit is bitsandbytes.nn.Linear4bit
from transformers.loss.loss_for_object_detection import linear_sum_assignment
assert linear_sum_assignment([[1, 0], [0, 1]])[1].tolist() == [1, 0]
beta = EulerDiscreteScheduler(use_beta_sigmas=True)
beta.set_timesteps(3)
unet = UNet2DConditionModel(
    block_out_channels=(8,), layers_per_block=1, cross_attention_dim=8, attention_head_dim=2, norm_num_groups=4,
    down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",), mid_block_type=None,
)
with tempfile.TemporaryDirectory() as folder:
    unet.save_pretrained(folder)
    read = UNet2DConditionModel.from_pretrained(folder)
assert read.state_dict().keys() == unet.state_dict().keys()
unet.add_adapter(peft.LoraConfig(target_modules=["to_q"]))
found = [layer for layer in unet.modules() if isinstance(layer, lora_base.BaseTunerLayer)]
assert found and isinstance(found[0], base.BaseTunerLayer) and issubclass(CLIPTextModel, lora_base.PreTrainedModel)
assert unet.device.type == "cpu"
from diffusers.models import modeling_utils
from diffusers.quantizers import DiffusersAutoQuantizer
from diffusers.quantizers.bitsandbytes.bnb_quantizer import BnB4BitDiffusersQuantizer
assert issubclass(BnB4BitDiffusersQuantizer, modeling_utils.DiffusersQuantizer)
assert modeling_utils.DiffusersAutoQuantizer.from_config == DiffusersAutoQuantizer.from_config
inputs = torch.zeros(1, 4, 4, 4), 1, torch.zeros(1, 2, 8)
compiled = torch.compile(unet, backend="eager")
torch.testing.assert_close(compiled(*inputs).sample, unet(*inputs).sample)
config = {"vocab_size": 50, "d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
from transformers import T5Config, T5EncoderModel
encoder = T5EncoderModel(T5Config(**config)).eval()
with tempfile.TemporaryDirectory() as folder:
    encoder.save_pretrained(folder)
    read = T5EncoderModel.from_pretrained(folder, device_map="cpu").eval()
ids = torch.tensor([[1, 2, 3]])
assert torch.equal(read(ids).last_hidden_state, encoder(ids).last_hidden_state)
print("USED")
"""


def test_a_started_run_has_imported_no_compiler_and_no_unused_models(
    sd1_command, sdxl_command, few_blocks_sd1, tiny_lumina, image_folder, dataset_toml, tmp_path, thorough
):
    """The compiler then compiles as always, and with ``--thorough`` whatever else was put off is used, too."""
    images = shutil.copytree(image_folder, tmp_path / "images")
    shared = [
        *("--dataset_config", dataset_toml(images, resolution=64, bucket_reso_steps=64), "--max_train_steps", "1"),
        *("--output_dir", tmp_path, "--network_train_unet_only", "--cache_latents_to_disk", "--gradient_checkpointing"),
        *("--cache_text_encoder_outputs", "--cache_text_encoder_outputs_to_disk"),
    ]
    commands = {"sd1": sd1_command, "sdxl": sdxl_command}
    arguments = {family: [str(word) for word in (*words, *shared)] for family, words in commands.items()}
    prompts_read = [str(word) for word in (*TINY["lumina"].command(tiny_lumina), *shared)]
    drawing = ["--ckpt", str(few_blocks_sd1), "--outdir", str(tmp_path), "--prompt", "a cat", "--steps", "1"]
    drawing += ["--W", "64", "--H", "64", "--opt_channels_last", "--offload"]
    unused = {"heavy": (*HEAVY, *UNUSED, *MODELS), "unused_by_encoders": UNUSED_BY_ENCODERS}
    code = TRAIN.format(arguments=arguments, drawing=drawing, prompts_read=prompts_read, encoders=ENCODERS, **unused)
    code += COMPILE + (USE if thorough else 'print("USED")')
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    for what in ("TRAINED", "DRAWN", "READ", "ENCODERS", "OPTIMIZERS", "LYCORIS"):
        assert f"{what} []" in result.stdout, result.stdout
    assert "COMPILED\n" in result.stdout and result.stdout.endswith("USED\n")
