"""The Python side of `belfry bench decode`: the same shards through webdataset, Pillow and numpy.

`photos FROM TO COUNT` makes photograph-sized JPEGs with captions out of small ones.
`read SHARDS TRANSFORM SIDE TOKENIZER TEXT_LEN BATCH` answers every line on its standard input with
the images and seconds of one pass over the shards.
"""

import math
import os
import random
import sys
import time

import numpy as np
from PIL import Image

# Sizes of COCO's pictures, by frequency.
SIZES = [(640, 480), (640, 427), (480, 640), (500, 375), (640, 480), (427, 640)]
# Grain as of a camera's sensor: without it enlarged pictures are easier to decode than any
# photograph. With it a file has the 0.3 to 0.5 bytes a pixel that COCO's have.
GRAIN = 11.0
MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32).reshape(3, 1, 1)
STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32).reshape(3, 1, 1)


def photos(source, target, count):
    names = sorted(name for name in os.listdir(source) if name.endswith(".jpg"))
    pictures = [Image.open(os.path.join(source, name)).convert("RGB") for name in names]
    noise = np.random.default_rng(0)
    for number in range(count):
        canvas = mosaic(pictures, number * 7, SIZES[number % len(SIZES)])
        pixels = np.asarray(canvas, np.float32)
        pixels = pixels + noise.normal(0, GRAIN, pixels.shape[:2] + (1,))
        canvas = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
        canvas.save(os.path.join(target, f"{number:05}.jpg"), quality=90)
        caption = os.path.join(source, names[number % len(names)][:-4] + ".txt")
        with open(caption) as read, open(os.path.join(target, f"{number:05}.txt"), "w") as write:
            write.write(read.read())


def mosaic(pictures, first, size):
    canvas, y = Image.new("RGB", size), 0
    while y < size[1]:
        x, row = 0, 0
        while x < size[0]:
            picture = pictures[first % len(pictures)]
            picture = picture.resize((picture.width * 8 // 5, picture.height * 8 // 5))
            canvas.paste(picture, (x, y))
            first, x, row = first + 1, x + picture.width, max(row, picture.height)
        y += max(60, row * 2 // 3)
    return canvas


def clip(picture, side):
    width, height = picture.size
    if width <= height:
        size = side, side * height // width
    else:
        size = side * width // height, side
    picture = picture.resize(size, Image.BICUBIC)
    left, top = round((size[0] - side) / 2), round((size[1] - side) / 2)
    return picture.crop((left, top, left + side, top + side))


def albef(picture, side):
    return picture.resize((side, side), Image.BICUBIC)


def cropped(picture, side):
    """RandomResizedCrop and flip. No RandomAugment: less work than the other side has."""
    width, height = picture.size
    for _ in range(10):
        area = width * height * random.uniform(0.5, 1.0)
        ratio = math.exp(random.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            x, y = random.randint(0, width - w), random.randint(0, height - h)
            picture = picture.crop((x, y, x + w, y + h))
            break
    picture = picture.resize((side, side), Image.BICUBIC)
    return picture.transpose(Image.FLIP_LEFT_RIGHT) if random.random() < 0.5 else picture


def read(shards, transform, side, tokenizer, text_len, batch):
    import tokenizers
    import webdataset

    transform = {"clip": clip, "albef": albef}.get(transform, cropped)
    words = tokenizers.Tokenizer.from_file(tokenizer)
    words.enable_truncation(text_len)
    words.enable_padding(length=text_len, pad_id=1)

    def image(picture):
        pixels = np.asarray(transform(picture, side)).transpose(2, 0, 1).astype(np.float32)
        pixels *= np.float32(1 / 255)
        pixels -= MEAN
        pixels /= STD
        return pixels

    def caption(text):
        return np.array(words.encode(text.split("\n")[0]).ids, np.int32)

    def collate(samples):
        return tuple(np.stack(column) for column in zip(*samples))

    def once():
        dataset = webdataset.WebDataset(shards, shardshuffle=False).decode("pil")
        dataset = dataset.to_tuple("jpg", "txt").map_tuple(image, caption)
        dataset = dataset.batched(batch, collation_fn=collate)
        return sum(len(images) for images, _ in dataset)

    once()
    print("ready", flush=True)
    for _ in sys.stdin:
        begun = time.perf_counter()
        images = once()
        print(images, time.perf_counter() - begun, flush=True)


if __name__ == "__main__":
    verb, *rest = sys.argv[1:]
    if verb == "photos":
        photos(rest[0], rest[1], int(rest[2]))
    else:
        shards = sorted(
            os.path.join(rest[0], name) for name in os.listdir(rest[0]) if name.endswith(".tar")
        )
        read(shards, rest[1], int(rest[2]), rest[3], int(rest[4]), int(rest[5]))
