"""Pictures as tokens: drawn by rules, cut into patches, each patch told by the nearest code.

No vision tower and no photograph: a language model sees a picture as discrete codes, as it would
those of a VQ model. Only pixels go in: whether a code is a 7 or a red edge must be learnt.

    codes = argmin_c |patch - table[c]|^2        patches of 8 x 8 pixels, 32 codes: <reserved_c>

Cards are 24 x 16 pixels, 6 codes; a scene has 4 x 4 cells of a patch each, 16 codes. Paper,
place (a pixel to the left or right of a card) and noise differ from picture to picture. The tables
are k-means over patches of all colours (models/codes.npz).

    python more/pictures.py                             # how well the codes can be read
    python more/pictures.py --fit models/codes.npz      # what made the tables
"""

import argparse
import functools
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np

PATCH, CODES, NOISE = 8, 32, 0.2
TABLES = Path(__file__).resolve().parent.parent / "models" / "codes.npz"

RANKS = {  # 5 x 7 pixels, drawn twice as large
    "A": "01110 10001 10001 11111 10001 10001 10001",
    "2": "01110 10001 00001 00110 01000 10000 11111",
    "3": "11110 00001 00001 01110 00001 00001 11110",
    "4": "00010 00110 01010 10010 11111 00010 00010",
    "5": "11111 10000 11110 00001 00001 10001 01110",
    "6": "00110 01000 10000 11110 10001 10001 01110",
    "7": "11111 00001 00010 00100 01000 01000 01000",
    "8": "01110 10001 10001 01110 10001 10001 01110",
    "9": "01110 10001 10001 01111 00001 00010 01100",
    "10": "10010 10101 10101 10101 10101 10101 10010",
    "J": "00111 00010 00010 00010 00010 10010 01100",
    "Q": "01110 10001 10001 10001 10101 10010 01101",
    "K": "10001 10010 10100 11000 10100 10010 10001",
}
SUITS = {
    "spades": "00100 01110 11111 11111 00100",
    "clubs": "01110 01110 11111 10101 00100",
    "hearts": "01010 11111 11111 01110 00100",
    "diamonds": "00100 01110 11111 01110 00100",
}
RED = "hearts", "diamonds"
SHAPES = {
    "circle": "01110 11111 11111 11111 01110",
    "square": "11111 11111 11111 11111 11111",
    "triangle": "00100 00100 01110 01110 11111",
    "cross": "10001 01010 00100 01010 10001",
}
INKS = {
    "red": (0.85, 0.1, 0.1),
    "green": (0.1, 0.7, 0.2),
    "blue": (0.1, 0.2, 0.85),
    "yellow": (0.9, 0.8, 0.1),
}


def draw(image: np.ndarray, bitmap: str, ink: tuple, top: int, left: int, scale: int = 1) -> None:
    """Put a bitmap of ink into an image (H, W, 3) of values from 0 to 1."""
    mask = np.array([[pixel == "1" for pixel in row] for row in bitmap.split()])
    mask = mask.repeat(scale, 0).repeat(scale, 1)
    height, width = mask.shape
    image[top : top + height, left : left + width][mask] = ink


def draw_card(rank: str, suit: str, rng: np.random.Generator) -> np.ndarray:
    """A card (24, 16, 3): its rank above its suit, black or red."""
    image = np.ones((24, 16, 3)) * rng.uniform(0.7, 1, 3)
    ink = (0.8, 0.1, 0.1) if suit in RED else (0.1, 0.1, 0.1)
    shift = int(rng.integers(-1, 2))
    draw(image, RANKS[rank], ink, 1, 3 + shift, scale=2)
    draw(image, SUITS[suit], ink, 17, 5 + shift)
    return image + rng.normal(0, NOISE, image.shape)


def draw_scene(cells: list, rng: np.random.Generator) -> np.ndarray:
    """A grid (32, 32, 3) of 16 cells by rows, each (colour, shape) or ()."""
    image = np.ones((32, 32, 3)) * rng.uniform(0.5, 0.7)
    for i, cell in enumerate(cells):
        if cell:
            colour, shape = cell
            top, left = PATCH * (i // 4) + 1, PATCH * (i % 4) + 1
            draw(image, SHAPES[shape], INKS[colour], top, left)
    return image + rng.normal(0, NOISE, image.shape)


def patches(image: np.ndarray) -> np.ndarray:
    """(H, W, 3) -> (patches by rows, 192)."""
    height, width, _ = image.shape
    tiles = image.reshape(height // PATCH, PATCH, width // PATCH, PATCH, 3).swapaxes(1, 2)
    return tiles.reshape(-1, PATCH * PATCH * 3)


def nearest(vectors: np.ndarray, table: np.ndarray) -> np.ndarray:
    """The codes of vectors (n, 192) by a table (CODES, 192)."""
    return ((table**2).sum(1) - 2 * vectors @ table.T).argmin(1)


def fit(vectors: np.ndarray, rng: np.random.Generator, starts: int = 10) -> np.ndarray:
    """The best k-means of some starts: a table (CODES, 192)."""
    best, least = vectors[:CODES], np.inf
    for _ in range(starts):
        table = vectors[rng.choice(len(vectors), CODES, replace=False)]
        for _ in range(20):
            codes = nearest(vectors, table)
            for code in np.unique(codes):
                table[code] = vectors[codes == code].mean(0)
        error = ((vectors - table[nearest(vectors, table)]) ** 2).mean()
        if error < least:
            best, least = table, error
    return best


@functools.cache
def tables() -> dict[str, np.ndarray]:
    """Those of models/, by "cards" and "scenes"."""
    with np.load(TABLES) as stored:
        return {name: stored[name].astype(float) for name in stored}


def tokens(image: np.ndarray, kind: str) -> str:
    """What a tiny model is shown of an image."""
    codes = nearest(patches(image), tables()[kind])
    return "".join(f"<reserved_{code}>" for code in codes)


def hand_tokens(cards: list[str], suits: list[str], seed: int) -> str:
    """Six tokens for each card."""
    rng = np.random.default_rng(seed)
    images = [draw_card(*card, rng) for card in zip(cards, suits, strict=True)]
    return "".join(tokens(image, "cards") for image in images)


def scene_tokens(cells: list, seed: int) -> str:
    """A token for each cell."""
    return tokens(draw_scene(cells, np.random.default_rng(seed)), "scenes")


# ---- are there enough codes?


def random_card(rng: np.random.Generator) -> tuple[np.ndarray, list]:
    rank, suit = rng.choice(list(RANKS)), rng.choice(list(SUITS))
    return draw_card(rank, suit, rng), [(rank, suit in RED)]


def random_scene(rng: np.random.Generator) -> tuple[np.ndarray, list]:
    cells = [random_cell(random.Random(int(rng.integers(2**32)))) for _ in range(16)]
    return draw_scene(cells, rng), cells


def random_cell(rng: random.Random) -> tuple:
    """Empty in half of the cases."""
    if rng.random() >= 0.5:
        return ()
    return rng.choice(list(INKS)), rng.choice(list(SHAPES))


def recognition(make: Callable, table: np.ndarray, rng: np.random.Generator) -> tuple[float, float]:
    """The share of 500 pictures' contents that their codes tell, and forms of a content on average.

    Told is what most of 3000 other contents with these codes are, or else with most of them in
    common (a card's six codes together, a scene's one by one).
    """
    known, asked = [], []
    for some, size in ((known, 3000), (asked, 500)):
        while len(some) < size:
            image, contents = make(rng)
            codes = nearest(patches(image), table).reshape(len(contents), -1)
            some += zip(contents, map(tuple, codes.tolist()), strict=True)
    rows, right = np.array([codes for _, codes in known]), 0
    for content, codes in asked:
        same = (rows == codes).sum(1)
        best = [known[i][0] for i in np.flatnonzero(same == same.max())]
        right += max(set(best), key=best.count) == content
    return right / len(asked), len(set(known)) / len({content for content, _ in known})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--fit", default="", help="file to write new tables to")
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    makers = {"cards": random_card, "scenes": random_scene}
    if args.fit:
        found = {}
        for kind, make in makers.items():
            vectors = np.concatenate([patches(make(rng)[0]) for _ in range(4000 // 6)])
            found[kind] = fit(vectors, rng).astype(np.float16)
        np.savez(args.fit, **found)
    for kind, make in makers.items():
        table = np.load(args.fit)[kind].astype(float) if args.fit else tables()[kind]
        right, forms = recognition(make, table, rng)
        print(f"{kind:8} told right {right:.3f}, forms of a content {forms:.1f}")


if __name__ == "__main__":
    main()
