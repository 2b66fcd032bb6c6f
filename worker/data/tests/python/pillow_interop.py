"""What Pillow, OpenCV and numpy make of random pictures and odd files, for the test beside it.

`pillow_interop.py files|resize|augment FOLDER SEED` writes pictures into FOLDER and prints a JSON
line for each: what was done, with what, and where input and output lie as raw bytes.
"""

import io
import json
import os
import struct
import sys
import zlib

import cv2
import numpy as np
from PIL import Image, ImageFile

folder, seed = sys.argv[2], int(sys.argv[3])
rng = np.random.default_rng(seed)
written = 0


def write(data):
    global written
    written += 1
    name = f"{written:05}.raw"
    with open(os.path.join(folder, name), "wb") as file:
        file.write(bytes(data))
    return name


def smooth(width, height, channels=3):
    """A random picture with edges and slopes, as photographs have them."""
    small = rng.integers(0, 256, (height // 6 + 2, width // 6 + 2, channels), dtype=np.uint8)
    picture = cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC)
    picture = picture.reshape(height, width, channels).astype(np.int32)
    return np.clip(picture + rng.integers(-9, 10, picture.shape), 0, 255).astype(np.uint8)


def noise(width, height, channels=3):
    return rng.integers(0, 256, (height, width, channels), dtype=np.uint8)


def picture(width, height, channels=3):
    return (smooth if rng.random() < 0.5 else noise)(width, height, channels)


def say(**line):
    print(json.dumps(line))


def resize():
    for _ in range(150):
        width, height = (int(v) for v in rng.integers(1, 200, 2))
        to = [int(v) for v in rng.integers(1, 200, 2)]
        channels = int(rng.choice([3, 4]))
        pixels = picture(width, height, channels)
        left, top = int(rng.integers(0, width)), int(rng.integers(0, height))
        right = int(rng.integers(left + 1, width + 1))
        bottom = int(rng.integers(top + 1, height + 1))
        part = [left, top, right - left, bottom - top]
        if channels == 4:
            part = [0, 0, width, height]
        image = Image.fromarray(pixels)
        if channels == 3:
            image = image.crop((left, top, right, bottom))
        image = image.resize(to, Image.BICUBIC)
        files = {"input": write(pixels.tobytes()), "output": write(image.tobytes())}
        say(size=[width, height], channels=channels, part=part, to=to, **files)


def table_of(pixels, tables):
    channels = [np.array(table)[pixels[..., c]] for c, table in enumerate(tables)]
    return np.stack(channels, -1).astype(np.uint8)


def auto_contrast(pixels):
    """With the 8-bit negation of the authors' code."""
    tables = []
    for c in range(3):
        low, high = int(pixels[..., c].min()), int(pixels[..., c].max())
        table = np.arange(256)
        if high > low:
            scale = 255 / (high - low)
            table = np.clip(table * scale + (-low % 256) * scale, 0, 255)
        tables.append(table.astype(np.uint8))
    return table_of(pixels, tables)


def equalize(pixels):
    from PIL import ImageOps

    return np.asarray(ImageOps.equalize(Image.fromarray(pixels)))


def colour(pixels, factor):
    away = np.eye(3, dtype=np.float32) - np.float32([0.114, 0.587, 0.299]).reshape(3, 1)
    away = np.float32(np.round(away, 3))
    matrix = away * factor + np.float32([0.114, 0.587, 0.299]).reshape(3, 1)
    return np.clip(np.matmul(pixels, matrix), 0, 255).astype(np.uint8)


def contrast(pixels, factor):
    mean = float(np.sum(np.mean(pixels, axis=(0, 1)) * np.array([0.114, 0.587, 0.299])))
    return np.clip((np.arange(256) - mean) * factor + mean, 0, 255).astype(np.uint8)[pixels]


def brightness(pixels, factor):
    return np.clip(np.arange(256, dtype=np.float32) * factor, 0, 255).astype(np.uint8)[pixels]


def sharpness(pixels, factor):
    kernel = np.ones((3, 3), np.float32)
    kernel[1, 1] = 5
    blurred = cv2.filter2D(pixels, -1, kernel / 13)
    if factor == 1.0:
        return pixels
    out = pixels.astype(np.float32)
    inner = blurred.astype(np.float32)[1:-1, 1:-1]
    out[1:-1, 1:-1] = inner + factor * (out[1:-1, 1:-1] - inner)
    # Wraps around, as the authors' conversion does.
    return (out.astype(np.int32) % 256).astype(np.uint8)


def warp(pixels, matrix):
    height, width = pixels.shape[:2]
    return cv2.warpAffine(pixels, matrix, (width, height), borderValue=(128, 128, 128))


def rotate(pixels, degrees):
    height, width = pixels.shape[:2]
    return warp(pixels, cv2.getRotationMatrix2D((width / 2, height / 2), degrees, 1))


def solarize(pixels, threshold):
    return np.where(pixels < threshold, pixels, 255 - pixels)


def augment():
    operations = {
        "AutoContrast": lambda p, a: auto_contrast(p),
        "Brightness": brightness,
        "Sharpness": sharpness,
        "Equalize": lambda p, a: equalize(p),
        "ShearX": lambda p, a: warp(p, np.float32([[1, a, 0], [0, 1, 0]])),
        "ShearY": lambda p, a: warp(p, np.float32([[1, 0, 0], [a, 1, 0]])),
        "TranslateX": lambda p, a: warp(p, np.float32([[1, 0, -a], [0, 1, 0]])),
        "TranslateY": lambda p, a: warp(p, np.float32([[1, 0, 0], [0, 1, -a]])),
        "Rotate": rotate,
        "Solarize": solarize,
        "Color": colour,
        "Contrast": contrast,
        "Posterize": lambda p, a: p & np.uint8((255 << (8 - a)) & 255),
    }
    for level in range(11):
        share, sign = level / 10, 1 if rng.random() < 0.5 else -1
        enhanced = share * 1.8 + 0.1
        arguments = {
            "Brightness": enhanced,
            "Sharpness": enhanced,
            "ShearX": sign * share * 0.3,
            "ShearY": sign * share * 0.3,
            "TranslateX": sign * share * 10,
            "TranslateY": sign * share * 10,
            "Rotate": sign * share * 30,
            "Solarize": int(share * 256),
            "Color": enhanced,
            "Contrast": enhanced,
            "Posterize": int(share * 4),
        }
        sizes = [(1, 1), (1, 9), (31, 1), (288, 288), tuple(rng.integers(2, 150, 2))]
        for width, height in ((int(w), int(h)) for w, h in sizes):
            pixels = picture(width, height)
            if rng.random() < 0.3:
                pixels = (pixels // 2 + 40).astype(np.uint8)
            given = write(pixels.tobytes())
            for name, operation in operations.items():
                argument = arguments.get(name)
                out = np.ascontiguousarray(operation(pixels, argument))
                files = {"input": given, "output": write(out.tobytes())}
                say(op=name, argument=argument, size=[width, height], **files)


def png16(kind, values):
    height, width = values.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)

    def chunk(name, data):
        body = name + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def encoded(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def odd_files():
    rgb = Image.fromarray(smooth(91, 67))
    grey = rgb.convert("L")
    rgba = Image.fromarray(np.concatenate([np.asarray(rgb), noise(91, 67, 1)], -1))
    palette = rgb.quantize(64)
    turned = Image.Exif()
    turned[0x112] = 6
    yield "grey.jpg", encoded(grey, "JPEG", quality=90)
    yield "cmyk.jpg", encoded(rgb.convert("CMYK"), "JPEG", quality=90)
    yield "progressive.jpg", encoded(rgb, "JPEG", quality=85, progressive=True)
    for subsampling, name in enumerate(["444", "422", "420"]):
        yield f"{name}.jpg", encoded(rgb, "JPEG", quality=90, subsampling=subsampling)
    yield "exif.jpg", encoded(rgb, "JPEG", quality=90, exif=turned)
    yield "trailing.jpg", encoded(rgb, "JPEG", quality=90) + b"\xff\xd8garbage" * 9
    yield "grey.png", encoded(grey, "PNG")
    yield "grey-alpha.png", encoded(rgba.convert("LA"), "PNG")
    yield "alpha.png", encoded(rgba, "PNG")
    yield "palette.png", encoded(palette, "PNG")
    yield "palette-trns.png", encoded(palette, "PNG", transparency=3)
    yield "colour-key.png", encoded(rgb, "PNG", transparency=tuple(np.asarray(rgb)[0, 0].tolist()))
    yield "bits.png", encoded(rgb.convert("1"), "PNG")
    for kind, channels in [(0, 1), (2, 3), (4, 2), (6, 4)]:
        yield f"16-bit-{channels}.png", png16(kind, rng.integers(0, 65536, (9, 14, channels)))
    yield "lossy.webp", encoded(rgb, "WEBP", quality=80)
    yield "lossless.webp", encoded(rgb, "WEBP", lossless=True)
    yield "alpha.webp", encoded(rgba, "WEBP", quality=80)
    yield "palette.gif", encoded(palette, "GIF")
    yield "rgb.bmp", encoded(rgb, "BMP")
    yield "palette.bmp", encoded(palette, "BMP")
    for width, height in [(1, 1), (1, 40), (40, 1), (7, 5), (17, 33), (10000, 3), (3, 10000)]:
        small = rgb.resize((width, height))
        yield f"{width}x{height}.jpg", encoded(small, "JPEG", quality=90)
        yield f"{width}x{height}.png", encoded(small, "PNG")


def files():
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    for name, data in odd_files():
        rgb = Image.open(io.BytesIO(data)).convert("RGB")
        rgba = Image.open(io.BytesIO(data)).convert("RGBA")
        say(
            name=name,
            size=list(rgb.size),
            input=write(data),
            rgb=write(rgb.tobytes()),
            rgba=write(rgba.tobytes()),
        )


{"files": files, "resize": resize, "augment": augment}[sys.argv[1]]()
