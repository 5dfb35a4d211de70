"""Captions, renders and tokenizer: Unicode CLDR names and keywords joined with Noto Color Emoji bitmaps.

Both come from Debian packages (unicode-cldr-core, fonts-noto-color-emoji); nothing is downloaded and no render is
kept outside the work folder. Pictures are RGB on white in [-1, 1].
"""

from __future__ import annotations

import random
import re
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from torch import Tensor

from training.emoji.networks import IMAGE, LENGTH

FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
CLDR = Path("/usr/share/unicode/cldr/common")
TONES = frozenset(chr(c) for c in range(0x1F3FB, 0x1F400))
CELL = 136  # the font's bitmaps are 136x128 pixels; we centre them in a square
FAMILIES = 30  # how many skin-tone families are used, each with its five tones
HELD_OUT = 0.1  # share of their tone combinations that is never trained on
OPENINGS = ("a", "the", "an emoji of a", "a picture of a", "icon of a")
POPULAR = ("face-", "cat-face", "monkey-face", "emotion", "animal-", "plant-", "food-", "drink", "transport-", "sky")
OTHERS = ("clothing", "musical-instrument", "event", "sport")
_FAVOURITES = (
    "red apple, green apple, banana, grapes, watermelon, strawberry, cherries, lemon, tangerine, pineapple, pear, "
    "peach, tomato, carrot, pizza, hamburger, hot dog, doughnut, cookie, shortcake, soft ice cream, dog face, cat "
    "face, mouse face, rabbit face, fox, bear, panda, koala, tiger face, lion, cow face, pig face, frog, monkey "
    "face, chicken, penguin, bird, owl, octopus, fish, spouting whale, turtle, butterfly, lady beetle, tulip, rose, "
    "sunflower, cactus, evergreen tree, four leaf clover, mushroom, rocket, automobile, taxi, bus, fire engine, "
    "police car, locomotive, airplane, sailboat, bicycle, sun, rainbow, snowman, snowflake, cloud, star, fire, "
    "umbrella, red heart, blue heart, green heart, broken heart, grinning face, smiling face with sunglasses, face "
    "with tears of joy, robot, ghost, alien, clown face, crown, guitar, balloon, Christmas tree, wrapped gift, "
    "jack-o-lantern, soccer ball, basketball"
)
FAVOURITES = frozenset(_FAVOURITES.split(", "))  # drawn four times as often
Font = ImageFont.FreeTypeFont


@dataclass(frozen=True)
class Glyph:
    """One emoji: its code points, CLDR name and keywords, CLDR label ("food-fruit"), family without its tone."""

    text: str
    name: str
    keywords: tuple[str, ...]
    label: str
    family: str = ""
    held_out: bool = False

    @property
    def weight(self) -> float:
        """How often it is drawn in training, against 1 for a popular one."""
        if self.name in FAVOURITES:
            return 4.0
        if self.family:
            return 0.5
        return 1.0 if self.popular else 0.8

    @property
    def popular(self) -> bool:
        """Whether it belongs to the labels that keep all their keywords."""
        return not self.family and self.label.startswith(POPULAR)


def read_captions() -> dict[str, tuple[str, tuple[str, ...]]]:
    """Code points -> (name, keywords), from CLDR's English annotations."""
    names: dict[str, str] = {}
    keywords: dict[str, tuple[str, ...]] = {}
    for folder in ("annotations", "annotationsDerived"):
        for node in ET.parse(CLDR / folder / "en.xml").getroot().iter("annotation"):
            text, value = node.get("cp") or "", node.text or ""
            if node.get("type") == "tts":
                names[text] = value
            else:
                keywords[text] = tuple(word.strip() for word in value.split("|"))
    return {text: (name, keywords.get(text, ())) for text, name in names.items()}


def read_labels() -> dict[str, str]:
    """Code points -> second-level label, from CLDR's labels.txt (a list of simple Unicode sets)."""
    labels: dict[str, str] = {}
    for line in (CLDR / "properties/labels.txt").read_text(encoding="utf-8").splitlines():
        fields = [field.strip() for field in line.split(";")]
        if line.startswith("#") or len(fields) < 3:
            continue
        body = fields[0].strip("[]")
        for text in re.findall(r"\{(.+?)\}", body):
            labels[text.replace("\ufe0f", "")] = fields[2]
        for first, last in re.findall(r"(.)(?:-(.))?", re.sub(r"\{.+?\}", "", body)):
            for code in range(ord(first), ord(last or first) + 1):
                labels[chr(code)] = fields[2]
    return labels


def open_font() -> Font:
    """The colour font at its only bitmap size."""
    return ImageFont.truetype(str(FONT), 109)


def draw(font: Font, text: str) -> Image.Image:
    """The glyph in the middle of a transparent 136x136 square."""
    cell = Image.new("RGBA", (CELL, CELL), (255, 255, 255, 0))
    ImageDraw.Draw(cell).text((0, 4), text, font=font, embedded_color=True)
    return cell


def render(font: Font, text: str, pixels: int) -> NDArray[np.float32]:
    """(3, pixels, pixels) float32 in [-1, 1], on white, Lanczos-reduced."""
    page = Image.new("RGBA", (CELL, CELL), "white")
    page.alpha_composite(draw(font, text))
    small = page.convert("RGB").resize((pixels, pixels), Image.Resampling.LANCZOS)
    picture: NDArray[np.float32] = np.asarray(small, np.float32).transpose(2, 0, 1) / np.float32(127.5) - 1
    return picture


def renders(glyphs: Iterable[Glyph], pixels: int = IMAGE) -> Tensor:
    """(N, 3, pixels, pixels)."""
    font = open_font()
    return torch.from_numpy(np.stack([render(font, glyph.text, pixels) for glyph in glyphs]))


def _drawable(font: Font, text: str) -> bool:
    """A single colour bitmap, not a blank or a row of parts."""
    if not 100 <= font.getlength(text) <= 140:
        return False
    alpha = np.asarray(draw(font, text))[:, :, 3]
    return bool((alpha > 0).sum() > 300)


def _is_flag(text: str) -> bool:
    return any(0x1F1E6 <= ord(c) <= 0x1F1FF or 0xE0020 <= ord(c) <= 0xE007F for c in text)


def choose_glyphs(seed: int = 0) -> list[Glyph]:
    """Faces, animals, plants, food, vehicles, weather, clothes, sport; 30 families of people and hands, five tones."""
    font, labels = open_font(), read_labels()
    glyphs: list[Glyph] = []
    families: dict[str, list[Glyph]] = {}
    seen: set[bytes] = set()
    for text, (name, keywords) in sorted(read_captions().items()):
        if _is_flag(text) or "\u200d" in text or not _drawable(font, text):
            continue
        picture = draw(font, text).tobytes()
        if picture in seen:
            continue
        seen.add(picture)
        family = "".join(c for c in text if c not in TONES) if set(text) & TONES and text not in TONES else ""
        glyph = Glyph(text, name, keywords, labels.get(text.replace("\ufe0f", ""), ""), family)
        if not family:
            glyphs.append(glyph)
        else:
            families.setdefault(family, []).append(glyph)
    labels_used = {g.label for g in glyphs if g.label.startswith(POPULAR)} - {"transport-sign"} | set(OTHERS)
    chosen, tones = _choose_tones(families, {glyph.text for glyph in glyphs}, seed)
    plain = [g for g in glyphs if g.text in chosen or (g.text not in families and g.label in labels_used)]
    return plain + tones


def _choose_tones(families: dict[str, list[Glyph]], bases: set[str], seed: int) -> tuple[set[str], list[Glyph]]:
    """The chosen families' bases and toned glyphs, a tenth of the latter held out."""
    whole = sorted(base for base, members in families.items() if len(members) == 5 and base in bases)
    draw_from = random.Random(seed)
    chosen = draw_from.sample(whole, min(FAMILIES, len(whole)))
    tones = [glyph for base in chosen for glyph in families[base]]
    held = set(draw_from.sample(range(len(tones)), round(len(tones) * HELD_OUT)))
    return set(chosen), [replace(glyph, held_out=i in held) for i, glyph in enumerate(tones)]


def split_words(text: str) -> list[str]:
    """What the tokenizer does, in plain Python: lower case, runs of letters and digits."""
    return "".join(c if c.isalnum() else " " for c in text.lower()).split()


def build_tokenizer(glyphs: Sequence[Glyph]) -> Tokenizer:
    """Word-level, 16 ids: the words of names and openings, and keyword words that are shared or of popular glyphs."""
    known = {word for glyph in glyphs for word in split_words(glyph.name)}
    known |= {word for opening in OPENINGS for word in split_words(opening)}
    shared = Counter(word for g in glyphs for word in set(split_words(" ".join(g.keywords))))
    popular = {word for g in glyphs if g.popular for word in split_words(" ".join(g.keywords))}
    known |= popular | {word for word, count in shared.items() if count > 1}
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", *sorted(known)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[^\p{L}\p{N}]+"), "removed")
    tokenizer.enable_padding(length=LENGTH, pad_id=0, pad_token="[PAD]")
    tokenizer.enable_truncation(LENGTH)
    return tokenizer


def encode(tokenizer: Tokenizer, texts: Sequence[str]) -> Tensor:
    """(B, 16) int64."""
    return torch.tensor([encoding.ids for encoding in tokenizer.encode_batch(list(texts))])


def random_prompt(glyph: Glyph, rng: random.Random, empty: float = 0.1) -> str:
    """A training prompt: the name, its name with an opening or a keyword, keywords alone, or (10 %) nothing."""
    draw_ = rng.random()
    if draw_ < empty:
        return ""
    few = rng.sample(glyph.keywords, rng.randint(1, min(3, len(glyph.keywords)))) if glyph.keywords else []
    if draw_ < empty + 0.08 and few:
        return " ".join(few)
    if draw_ < empty + 0.16 and few:
        return f"{glyph.name} {few[0]}"
    if draw_ < empty + 0.24:
        return f"{rng.choice(OPENINGS)} {glyph.name}"
    return glyph.name
