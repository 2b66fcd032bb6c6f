"""Reads shards that Belfry packed, and writes shards for it to index, with the webdataset package.

usage: webdataset_interop.py read FOLDER      prints one JSON line per sample: key, sha256, captions
       webdataset_interop.py write PHOTOS OUT  writes OUT/foreign-000000.tar of PHOTOS' images
"""

import glob
import hashlib
import json
import os
import sys

import webdataset


def read(folder):
    shards = sorted(glob.glob(os.path.join(folder, "*.tar")))
    for sample in webdataset.WebDataset(shards, shardshuffle=False):
        image = next(sample[k] for k in ("jpg", "png", "webp") if k in sample)
        line = {
            "key": sample["__key__"],
            "sha256": hashlib.sha256(image).hexdigest(),
            "captions": sample["txt"].decode().strip().split("\n"),
        }
        print(json.dumps(line))


def write(photos, out):
    with webdataset.TarWriter(os.path.join(out, "foreign-000000.tar")) as sink:
        for image in sorted(glob.glob(os.path.join(photos, "*.jpg")))[:20]:
            stem = os.path.splitext(image)[0]
            with open(image, "rb") as i, open(stem + ".txt", "rb") as t:
                sink.write({"__key__": os.path.basename(stem), "jpg": i.read(), "txt": t.read()})


if __name__ == "__main__":
    {"read": read, "write": write}[sys.argv[1]](*sys.argv[2:])
