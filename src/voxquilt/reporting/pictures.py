"""Composes pictures: margins with letters, pictures side by side, and pictures below each other with captions."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw

MARGIN = 20  # pixels around each plane, for the letters
FONT_SIZE = 14  # pixels
LINE = 24  # pixels of a caption


def stacked(pictures: Sequence[tuple[str, Image.Image]]) -> Image.Image:
    """Pictures below each other, each below its caption."""
    canvas = Image.new(
        "RGB", (max(picture.width for _, picture in pictures), sum(picture.height + LINE for _, picture in pictures))
    )
    draw, top = ImageDraw.Draw(canvas), 0
    for caption, picture in pictures:
        draw.text((MARGIN, top + LINE // 2), caption, fill="white", anchor="lm", font_size=FONT_SIZE)
        canvas.paste(picture, (0, top + LINE))
        top += LINE + picture.height
    return canvas


def with_letters(picture: UInt8[np.ndarray, "h w 3"], letters: str) -> Image.Image:
    """A picture with a black margin, and one letter at the middle of each side."""
    height, width, _ = picture.shape
    panel = Image.new("RGB", (width + 2 * MARGIN, height + 2 * MARGIN))
    panel.paste(Image.fromarray(picture), (MARGIN, MARGIN))
    draw, half, middle = ImageDraw.Draw(panel), MARGIN // 2, (panel.width // 2, panel.height // 2)
    places = [(half, middle[1]), (panel.width - half, middle[1])]
    places += [(middle[0], panel.height - half), (middle[0], half)]
    for place, letter in zip(places, letters, strict=True):
        draw.text(place, letter, fill="white", anchor="mm", font_size=FONT_SIZE)
    return panel


def side_by_side(panels: list[Image.Image]) -> Image.Image:
    height = max(panel.height for panel in panels)
    canvas = Image.new("RGB", (sum(panel.width for panel in panels), height))
    left = 0
    for panel in panels:
        canvas.paste(panel, (left, (height - panel.height) // 2))
        left += panel.width
    return canvas
