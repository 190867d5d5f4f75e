"""diffusers and transformers are first imported without what nothing here uses; other classes then bring none of it."""

from library.lean_imports import diffusers_class, transformers_class

diffusers_class("UNet2DConditionModel")
for module, name in (("clip", "CLIPTextModel"), ("t5", "T5EncoderModel"), ("gemma2", "Gemma2Model")):
    transformers_class(f"{module}.modeling_{module}", name)
