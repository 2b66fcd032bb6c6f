"""Hidden states of random RoBERTa and CLIP models of transformers, for Belfry's encoders to meet.

usage: hidden_states.py FOLDER   (needs torch, transformers, safetensors)

Writes text.safetensors and image.safetensors (weights in the library's names) and
states.safetensors: in/ids [B, T], in/mask [B, T], in/pixels [B, 3, S, S], and per layer l
text_layer.l [B, T, D] and image_layer.l [B, 1 + patches, D]. Sizes are those of configs/tiny.toml
with 60 words and 20 positions.
"""

import os
import sys

import torch
import transformers
from safetensors.torch import save_file

D, LAYERS, HEADS, WORDS, POSITIONS, LENGTH, SIDE, PATCH, ROWS = 16, 2, 2, 60, 20, 16, 32, 16, 3
PAD = 1


def excite(model):
    """Fresh norms and biases are constants; random ones would show a mix-up."""
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def main():
    (folder,) = sys.argv[1:]
    torch.manual_seed(1)
    sizes = dict(hidden_size=D, num_hidden_layers=LAYERS, num_attention_heads=HEADS)
    text = excite(transformers.RobertaModel(transformers.RobertaConfig(
        vocab_size=WORDS, max_position_embeddings=POSITIONS, type_vocab_size=1, pad_token_id=PAD,
        intermediate_size=2 * D, layer_norm_eps=1e-5, **sizes)))
    image = excite(transformers.CLIPVisionModel(transformers.CLIPVisionConfig(
        intermediate_size=4 * D, image_size=SIDE, patch_size=PATCH, **sizes)))
    save_file(text.state_dict(), os.path.join(folder, "text.safetensors"))
    save_file(image.state_dict(), os.path.join(folder, "image.safetensors"))

    ids = torch.randint(2, WORDS, (ROWS, LENGTH))
    for row in range(ROWS):
        ids[row, LENGTH - 3 * row:] = PAD
    mask = (ids != PAD).long()
    pixels = torch.randn(ROWS, 3, SIDE, SIDE)
    states = {"in/ids": ids, "in/mask": mask.float(), "in/pixels": pixels}
    with torch.no_grad():
        words = text(ids, attention_mask=mask, output_hidden_states=True).hidden_states
        # A hook sees a block's own output, whatever the library does with the last one.
        seen = []
        for block in image.get_submodule("encoder").layers:
            keep = lambda _module, _inputs, out: seen.append(out[0] if isinstance(out, tuple) else out)
            block.register_forward_hook(keep)
        image(pixels)
    for layer in range(LAYERS):
        states[f"text_layer.{layer}"] = words[layer + 1].contiguous()
        states[f"image_layer.{layer}"] = seen[layer].contiguous()
    save_file(states, os.path.join(folder, "states.safetensors"))
    print("ok")


if __name__ == "__main__":
    main()
