"""Golden data of backbones that the authors' golden models do not have: BERT and timm's ViT/DeiT.

Random weights, larger than trained ones start, so that every part matters. Needs torch (CPU), transformers and timm:

    python tests/golden/make_backbones.py [FOLDER]

Per tower: NAME.json (sizes, versions), NAME.model.safetensors (param/NAME, the authors' names), NAME.io.safetensors
(in/*, out/* as in the other golden files; image_ln_post.l is the final norm of every block's output).
"""
import json
import pathlib
import sys

import timm
import torch
import transformers
from safetensors.torch import save_file

FOLDER = pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else pathlib.Path(__file__).parent)
UNUSED = ("pooler", "position_ids", "token_type_ids")


def randomise(model, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            is_scale = "norm" in name.lower() and name.endswith("weight")
            parameter.copy_(1 + 0.2 * noise if is_scale else 0.15 * noise)
    return model.eval()


def save(name, prefix, model, description, tensors):
    weights = {f"param/{prefix}{k}": v.contiguous() for k, v in model.state_dict().items() if not any(u in k for u in UNUSED)}
    save_file(weights, FOLDER / f"{name}.model.safetensors")
    save_file({k: v.contiguous() for k, v in tensors.items()}, FOLDER / f"{name}.io.safetensors")
    versions = {m.__name__: m.__version__ for m in (torch, transformers, timm)}
    (FOLDER / f"{name}.json").write_text(json.dumps({**description, "made_with": versions}, indent=1) + "\n")


def bert():
    sizes = dict(vocab=50, hidden=24, layers=3, heads=3, intermediate=40, positions=12)
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=24, num_hidden_layers=3, num_attention_heads=3, intermediate_size=40,
        max_position_embeddings=12, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, attn_implementation="eager")
    model = randomise(transformers.BertModel(config, add_pooling_layer=False), 1)
    ids = torch.randint(3, 50, (3, 9), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    for row, tokens in enumerate((9, 6, 4)):
        ids[row, tokens:], mask[row, tokens:] = 0, 0
    with torch.no_grad():
        states = model(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
    tensors = {"in/text_ids": ids, "in/text_masks": mask, "out/text_embeddings": states[0]}
    tensors |= {f"out/text_layer.{l}": state for l, state in enumerate(states[1:])}
    save("backbone_bert", "text_transformer.", model, dict(tower="text", kind="bert", sizes=sizes), tensors)


def vit():
    sizes = dict(hidden=24, layers=3, heads=3, size=24, patch=8)
    model = timm.models.VisionTransformer(img_size=24, patch_size=8, embed_dim=24, depth=3, num_heads=3, num_classes=0, global_pool="token")
    randomise(model, 3)
    image = torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(4))
    tensors = {"in/image": image}
    with torch.no_grad():
        x = model._pos_embed(model.patch_embed(image))
        for l, block in enumerate(model.blocks):
            x = block(x)
            tensors |= {f"out/image_layer.{l}": x, f"out/image_ln_post.{l}": model.norm(x)}
    save("backbone_vit", "vit_model.", model, dict(tower="image", kind="vit", sizes=sizes), tensors)


bert()
vit()
