"""Write scikit-learn's digits as an image folder, for training without a network: ``digits.py FOLDER``.

1797 real images of 8x8 grey pixels, as FOLDER/train/7/0007.png; every fifth one is in FOLDER/test.
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("folder", type=Path)
folder = parser.parse_args().folder

digits = load_digits()
grey = (digits.images * (255 / digits.images.max())).astype(np.uint8)
for row, (pixels, label) in enumerate(zip(grey, digits.target, strict=True)):
    file = folder / ("train" if row % 5 else "test") / str(label) / f"{row:04}.png"
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(file)
