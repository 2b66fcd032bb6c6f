"""Reads shards that Belfry packed, and writes shards for it to index, with the webdataset package.

usage: webdataset_interop.py read FOLDER      prints one JSON line per sample: key, sha256 of each
                                              member by its extension, the text
       webdataset_interop.py write PHOTOS OUT  writes tars of PHOTOS' images as people write them:
           plain.tar    ustar names, as TarWriter writes them
           pax.tar      names of 300 letters in PAX headers, non-ASCII names
           gnu.tar      names of 300 letters in GNU long-name members
           odd.tar      upper-case extensions, folders, members that are neither image nor text,
                        several captions
           pairs.tar    two images of a sample with labels, in pairs.json
"""

import glob
import hashlib
import io
import json
import os
import sys
import tarfile

import webdataset

LONG = "a-name-that-no-plain-header-holds-" * 8 + "x" * 28


def read(folder):
    shards = sorted(glob.glob(os.path.join(folder, "*.tar")))
    for sample in webdataset.WebDataset(shards, shardshuffle=False):
        members = {k: v for k, v in sample.items() if not k.startswith("__")}
        texts = [v.decode() for k, v in members.items() if k in ("txt", "pairs.json")]
        line = {
            "key": sample["__key__"],
            "sha256": {k: hashlib.sha256(v).hexdigest() for k, v in members.items()},
            "text": texts[0],
        }
        print(json.dumps(line))


def content(file):
    with open(file, "rb") as f:
        return f.read()


def tar(path, kind, members):
    with tarfile.open(path, "w", format=kind) as sink:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            sink.addfile(member, io.BytesIO(data))


def write(photos, out):
    images = sorted(glob.glob(os.path.join(photos, "*.jpg")))[:20]
    stems = [os.path.splitext(os.path.basename(image))[0] for image in images]
    photo = dict(zip(stems, map(content, images)))
    text = {stem: content(os.path.join(photos, stem + ".txt")) for stem in stems}
    with webdataset.TarWriter(os.path.join(out, "plain.tar")) as sink:
        for stem in stems:
            sink.write({"__key__": stem, "jpg": photo[stem], "txt": text[stem]})

    def captioned(prefix):
        for stem in stems[:3]:
            yield f"{prefix}{stem}.jpg", photo[stem]
            yield f"{prefix}{stem}.txt", text[stem]

    pax = [*captioned(f"pax/{LONG}/{LONG}-"), *captioned("pax-größe-漢字/")]
    tar(os.path.join(out, "pax.tar"), tarfile.PAX_FORMAT, pax)
    tar(os.path.join(out, "gnu.tar"), tarfile.GNU_FORMAT, captioned(f"gnu/{LONG}/{LONG}-"))

    first, second = stems[:2]
    odd = [
        (f"./odd/{first}.JPG", photo[first]),
        (f"./odd/{first}.TXT", b"one caption\nand another\n\none caption\nAnd a third.\r\n"),
        (f"./odd/{first}.json", b'{"url": "http://example.com"}'),
        (f"./odd/{first}.cls", b"7"),
        (f"./odd/{second}.Jpeg", photo[second]),
        (f"./odd/{second}.txt", text[second]),
    ]
    tar(os.path.join(out, "odd.tar"), tarfile.USTAR_FORMAT, odd)

    pairs = [{"text": "both are toys", "id": "dev-0-0", "labels": [1]}, {"text": "ça va 漢"}]
    with webdataset.TarWriter(os.path.join(out, "pairs.tar")) as sink:
        members = {"0.jpg": photo[first], "1.jpg": photo[second]}
        members["pairs.json"] = json.dumps(pairs).encode()
        sink.write({"__key__": "nlvr2/dev-0", **members})


if __name__ == "__main__":
    {"read": read, "write": write}[sys.argv[1]](*sys.argv[2:])
