"""Weights between Belfry and PyTorch, with real files of both worlds and random numbers in them.

usage: weights.py BELFRY FOLDER   (needs torch, transformers, safetensors)

Models of transformers, a scripted module in OpenAI's naming and a Lightning-like checkpoint are
written by PyTorch, imported by the binary BELFRY and compared tensor by tensor with what this
script makes of them by its own rules. Ends with one line that starts with `ok`.
"""

import argparse
import collections
import json
import os
import subprocess
import sys

import numpy
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch.nn import functional

D, LAYERS, HEADS, VOCAB, POSITIONS = 16, 2, 2, 60, 20
SIDE, PATCH, CLIP_SIDE = 32, 16, 64
CONFIG = "configs/tiny.toml"
SETTINGS = [f"model.text.vocab={VOCAB}", f"model.text.positions={POSITIONS}", "data.text_len=16"]
LEFTOVERS = (77, 512)


class Hidden(dict):
    """Stands for the classes that trainers put beside the weights."""


def belfry(binary, *arguments, fails=None):
    done = subprocess.run([binary, *map(str, arguments)], capture_output=True, text=True)
    said = done.stdout + done.stderr
    if fails is None:
        assert done.returncode == 0, said
    else:
        assert done.returncode != 0, f"must fail: {arguments}"
        for part in fails:
            assert part in said, f"`{part}` is not in: {said}"
    return said


def imported(binary, folder, name, sources, *more):
    out, report = os.path.join(folder, f"{name}.safetensors"), os.path.join(folder, f"{name}.json")
    arguments = [a for source in sources for a in ("--from", source)]
    settings = [a for s in SETTINGS for a in ("--set", s)]
    belfry(binary, "import", *arguments, "--to", out, "--report", report, *settings, *more, CONFIG)
    with open(report) as file:
        return load_file(out), json.load(file)


def text_expected(state, prefix):
    kept = ("embeddings.", "encoder.", "pooler.")
    names = {k[len(prefix):]: v for k, v in state.items() if k.startswith(prefix)}
    return {f"text_transformer.{k}": v for k, v in names.items() if k.startswith(kept)}


def scaled(table):
    side = int((len(table) - 1) ** 0.5)
    picture = table[1:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
    to = SIDE // PATCH
    picture = functional.interpolate(picture, size=(to, to), mode="bicubic", align_corners=False)
    return torch.cat([table[:1], picture.permute(0, 2, 3, 1).reshape(to * to, -1)])


def clip_expected(state):
    out = {}
    v = {k[len("vision_model."):]: t for k, t in state.items() if k.startswith("vision_model.")}
    visual = "vit_model.visual."
    out[visual + "class_embedding"] = v["embeddings.class_embedding"]
    out[visual + "conv1.weight"] = v["embeddings.patch_embedding.weight"]
    out[visual + "positional_embedding"] = scaled(v["embeddings.position_embedding.weight"])
    for kind in ("weight", "bias"):
        out[f"{visual}ln_pre.{kind}"] = v[f"pre_layrnorm.{kind}"]
        out[f"{visual}ln_post.{kind}"] = v[f"post_layernorm.{kind}"]
        for layer in range(LAYERS):
            own, theirs = f"{visual}transformer.resblocks.{layer}.", f"encoder.layers.{layer}."
            parts = [v[f"{theirs}self_attn.{p}_proj.{kind}"] for p in "qkv"]
            out[f"{own}attn.in_proj_{kind}"] = torch.cat(parts)
            pairs = {"attn.out_proj": "self_attn.out_proj", "ln_1": "layer_norm1",
                     "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
            for mine, its in pairs.items():
                out[f"{own}{mine}.{kind}"] = v[f"{theirs}{its}.{kind}"]
        out[f"vit_model.ln_final.{kind}"] = state[f"text_model.final_layer_norm.{kind}"]
    out["vit_model.positional_embedding"] = state["text_model.embeddings.position_embedding.weight"]
    return out


def same(found, expected, what, tolerant=("visual.positional_embedding",)):
    found = {k: v for k, v in found.items() if not k.endswith("position_ids")}
    missing, more = expected.keys() - found.keys(), found.keys() - expected.keys()
    assert not missing and not more, f"{what}: missing {missing}, not expected {more}"
    for name, tensor in expected.items():
        tensor = tensor.detach().float().reshape(found[name].shape)
        if name.endswith(tolerant):
            worst = (found[name] - tensor).abs().max().item()
            assert worst < 2e-6, f"{what}: {name} differs by {worst}"
        else:
            assert torch.equal(found[name], tensor), f"{what}: {name} differs"
    print(f"{what}: {len(expected)} tensors equal")


def text_models(folder):
    sizes = dict(hidden_size=D, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
                 intermediate_size=2 * D, vocab_size=VOCAB, max_position_embeddings=POSITIONS)
    config = transformers.RobertaConfig(type_vocab_size=1, pad_token_id=1, **sizes)
    roberta = transformers.RobertaForMaskedLM(config)
    roberta.save_pretrained(os.path.join(folder, "roberta"))
    torch.save(roberta.state_dict(), os.path.join(folder, "roberta.bin"))
    bert = transformers.BertForPreTraining(transformers.BertConfig(type_vocab_size=1, **sizes))
    state = {k.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): v
             for k, v in bert.state_dict().items()}
    torch.save(state, os.path.join(folder, "bert.bin"))
    return roberta.state_dict(), bert.state_dict()


def clip_model(folder):
    vision = dict(hidden_size=D, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
                  intermediate_size=4 * D, image_size=CLIP_SIDE, patch_size=PATCH)
    text = dict(hidden_size=LEFTOVERS[1], num_hidden_layers=1, num_attention_heads=HEADS,
                intermediate_size=8, vocab_size=VOCAB, max_position_embeddings=LEFTOVERS[0],
                bos_token_id=0, eos_token_id=1, pad_token_id=2)
    config = transformers.CLIPConfig(vision_config=vision, text_config=text, projection_dim=8)
    clip = transformers.CLIPModel(config)
    for parameter in clip.parameters():
        # Fresh biases and norms are constants, which would hide a mix-up.
        torch.nn.init.normal_(parameter)
    clip.save_pretrained(os.path.join(folder, "clip"))
    torch.save(clip.state_dict(), os.path.join(folder, "clip.bin"))
    return clip.state_dict()


class Module(torch.nn.Module):
    """A tree of modules that holds tensors under dotted names."""

    def __init__(self, tensors):
        super().__init__()
        children = collections.defaultdict(dict)
        for name, tensor in tensors.items():
            root, _, rest = name.partition(".")
            if rest:
                children[root][rest] = tensor
            elif tensor.is_floating_point():
                self.register_parameter(root, torch.nn.Parameter(tensor.clone()))
            else:
                self.register_buffer(root, tensor.clone())
        for root, inside in children.items():
            self.add_module(root, Module(inside))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def openai_file(folder, expected):
    """OpenAI publishes f16 scripted modules; a table of the model's own grid stays as it is."""
    names = {k[len("vit_model."):]: v.half() for k, v in expected.items()}
    names["visual.proj"] = torch.randn(D, 8).half()
    names["token_embedding.weight"] = torch.randn(VOCAB, 8).half()
    path = os.path.join(folder, "openai.pt")
    torch.jit.save(torch.jit.script(Module(names)), path)
    return path, {k: v.half() for k, v in expected.items()}


def vit_files(folder):
    """ViT of transformers; Belfry's refusal names the architecture where the model is CLIP."""
    sizes = dict(hidden_size=D, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
                 intermediate_size=4 * D, image_size=SIDE, patch_size=PATCH)
    vit = transformers.ViTForImageClassification(transformers.ViTConfig(**sizes))
    vit.save_pretrained(os.path.join(folder, "vit"))
    return os.path.join(folder, "vit", "model.safetensors")


def lightning_file(folder, model):
    """A checkpoint as a trainer writes it: views, other types and foreign objects around weights."""
    state = collections.OrderedDict()
    for i, (name, tensor) in enumerate(sorted(model.items())):
        if not tensor.is_floating_point():
            state[name] = tensor
            continue
        value = torch.randn(tensor.shape)
        if i % 5 == 0 and value.dim() == 2:
            value = torch.randn(tensor.shape[::-1]).t()
        elif i % 5 == 1:
            value = torch.randn((2, *tensor.shape))[1]
        elif i % 5 == 2:
            value = value.double()
        elif i % 5 == 3:
            value = value.bfloat16()
        state[name] = torch.nn.Parameter(value) if i % 2 else value
    state._metadata = collections.OrderedDict({"": {"version": 1}})
    checkpoint = {
        "epoch": 3,
        "global_step": 10**12,
        "pytorch-lightning_version": "1.5.10",
        "callbacks": {Hidden: {"best_model_score": torch.tensor(0.5), "path": "a/b.ckpt"}},
        "optimizer_states": [{"state": {0: {"step": 3, "exp_avg": torch.randn(4)}},
                              "param_groups": [{"lr": 1e-5, "betas": (0.9, 0.98), "params": [0]}]}],
        "lr_schedulers": [{"_step_count": 4, "lr_lambdas": [None]}],
        "hyper_parameters": Hidden(config=argparse.Namespace(seed=0, steps=None)),
        "score": numpy.float64(0.25),
        "counts": numpy.arange(3),
        "kept": {1, 2},
        "state_dict": state,
    }
    path = os.path.join(folder, "ManagerTower_fake.ckpt")
    torch.save(checkpoint, path)
    return path, state


class Attack:
    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def main():
    binary, folder = sys.argv[1:]
    torch.manual_seed(0)
    roberta, bert = text_models(folder)
    clip = clip_model(folder)
    at = lambda *parts: os.path.join(folder, *parts)
    expected = {**text_expected(roberta, "roberta."), **clip_expected(clip)}

    files = [at("roberta", "model.safetensors"), at("clip", "model.safetensors")]
    found, report = imported(binary, folder, "from_safetensors", files)
    same(found, expected, "transformers, safetensors")
    assert "mlm_score.decoder.weight" in report["fresh"], report["fresh"]
    found, _ = imported(binary, folder, "from_bin", [at("roberta.bin"), at("clip.bin")])
    same(found, expected, "transformers, .bin")

    found, _ = imported(binary, folder, "bert", [at("bert.bin"), at("clip.bin")])
    same(found, {**text_expected(bert, "bert."), **clip_expected(clip)}, "BERT with gamma and beta")

    openai, halves = openai_file(folder, clip_expected(clip))
    found, report = imported(binary, folder, "openai", [at("roberta.bin"), openai])
    same(found, {**text_expected(roberta, "roberta."), **halves}, "OpenAI, scripted f16", ())
    assert any("f16" in n for a in report["applied"] for n in a["notes"])

    complete, _ = imported(binary, folder, "complete", files, "--complete")
    checkpoint, state = lightning_file(folder, complete)
    found, report = imported(binary, folder, "checkpoint", [checkpoint])
    floats = {k: v for k, v in state.items() if v.is_floating_point()}
    same(found, floats, "Lightning-like checkpoint", ())
    assert report["fresh"] == [], report["fresh"]

    # What Belfry writes, PyTorch loads without a key missing or left over.
    module = Module({k: torch.zeros_like(v) for k, v in state.items()})
    module.load_state_dict(found, strict=True)
    print("load_state_dict(strict=True): ok")
    again, _ = imported(binary, folder, "again", [at("checkpoint.safetensors")])
    same(again, {k: v for k, v in found.items() if v.is_floating_point()}, "round trip", ())
    with open(at("again.safetensors"), "rb") as a, open(at("checkpoint.safetensors"), "rb") as b:
        assert a.read() == b.read(), "a round trip changes the file"

    settings = [a for s in SETTINGS for a in ("--set", s)]
    refuse = lambda source, *parts: belfry(binary, "import", "--from", source, "--to", at("no"),
                                           *settings, CONFIG, fails=parts)
    witness = at("witness")
    torch.save({"a": Attack(f"touch {witness}"), "state_dict": state}, at("attack.ckpt"))
    refuse(at("attack.ckpt"), "posix.system", "nothing was executed")
    assert not os.path.exists(witness), "the attack ran"
    torch.save(state, at("legacy.bin"), _use_new_zipfile_serialization=False)
    refuse(at("legacy.bin"), "before 1.6", "torch.save(torch.load(")
    refuse(vit_files(folder), "ViT/DeiT (transformers)", "no place")
    assert not os.path.exists(at("no")), "a refused import writes nothing"
    print(f"ok: torch {torch.__version__}, transformers {transformers.__version__}")


if __name__ == "__main__":
    main()
