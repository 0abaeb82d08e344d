"""Draw the picture of a cat that the examples use, always the same one, as cat.png."""

import math
import random
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageChops, ImageDraw, ImageFilter

Point = tuple[float, float]
Colour = tuple[int, int, int]

WIDTH, HEIGHT = 256, 320  # Not square, so that a network's input has to be cut from it.
ZOOM = 4  # Drawn this much larger, then reduced: that smooths the edges.

FUR, DARK, LIGHT, CREAM = (214, 132, 60), (150, 80, 32), (240, 176, 104), (252, 238, 216)
PINK, NOSE, LINE = (236, 164, 152), (206, 110, 108), (84, 48, 30)


def big(points: Sequence[Point]) -> list[Point]:
    return [(x * ZOOM, y * ZOOM) for x, y in points]


def between(a: float, b: float, c: float, d: float, t: float) -> float:
    """Go from b (t = 0) to c (t = 1) with the slopes that the neighbours a and d give."""
    bend = (2 * a - 5 * b + 4 * c - d) * t * t + (3 * b - a - 3 * c + d) * t * t * t
    return b + 0.5 * ((c - a) * t + bend)


def curve(points: Sequence[Point], steps: int = 12, closed: bool = True) -> list[Point]:
    """Return a smooth line through the points (a Catmull-Rom spline)."""
    ends = (points[-1], points[0], points[1]) if closed else (points[0], points[-1])
    ring = [ends[0], *points, *ends[1:]]
    line = []
    for (ax, ay), (bx, by), (cx, cy), (dx, dy) in zip(
        ring, ring[1:], ring[2:], ring[3:], strict=False
    ):
        for t in (step / steps for step in range(steps)):
            line.append((between(ax, bx, cx, dx, t), between(ay, by, cy, dy, t)))
    return line if closed else [*line, points[-1]]


def mirrored(points: Sequence[Point], axis: float = 128) -> list[Point]:
    return [(2 * axis - x, y) for x, y in points]


def disc(pen: ImageDraw.ImageDraw, x: float, y: float, rx: float, ry: float, fill: object) -> None:
    pen.ellipse([*big([(x - rx, y - ry)])[0], *big([(x + rx, y + ry)])[0]], fill=fill)


def mix(one: Colour, other: Colour, share: float) -> Colour:
    red, green, blue = (round(a + (b - a) * share) for a, b in zip(one, other, strict=True))
    return red, green, blue


def empty_mask() -> Image.Image:
    return Image.new("L", (WIDTH * ZOOM, HEIGHT * ZOOM), 0)


def shade(image: Image.Image, mask: Image.Image, colour: Colour, blur: float) -> None:
    """Lay a colour over the masked part, with the mask's edge blurred by so many pixels."""
    image.paste(colour, (0, 0), mask.filter(ImageFilter.GaussianBlur(blur * ZOOM)))


def draw_room(image: Image.Image, dice: random.Random) -> None:
    pen = ImageDraw.Draw(image)
    floor = 236
    for y in range(floor * ZOOM):
        share = y / (floor * ZOOM)
        pen.line([(0, y), (WIDTH * ZOOM, y)], fill=mix((96, 148, 158), (178, 206, 196), share))
    for row in range(11):
        for column in range(10):
            x, y = 14 + column * 26 + (row % 2) * 13, 10 + row * 21
            tint = mix((120, 170, 174), (196, 220, 210), y / floor)
            for angle in range(5):
                turn = math.tau * angle / 5 - math.pi / 2
                disc(pen, x + 3 * math.cos(turn), y + 3 * math.sin(turn), 1.7, 1.7, tint)
            disc(pen, x, y, 1.3, 1.3, (232, 214, 160))
    glow = empty_mask()
    ImageDraw.Draw(glow).polygon(big([(0, 10), (120, 0), (256, 190), (90, 236)]), fill=70)
    shade(image, glow, (255, 246, 214), 10)

    top = float(floor)
    for plank in range(5):
        depth = 10 + plank * 5
        base = mix((172, 120, 78), (140, 92, 58), dice.random())
        pen.rectangle([*big([(0, top)])[0], *big([(WIDTH, top + depth)])[0]], fill=base)
        for _ in range(46):
            x, y = dice.uniform(-30, WIDTH), top + dice.uniform(1, depth - 1)
            grain = [(x + 12 * k, y + dice.uniform(-0.5, 0.5)) for k in range(4)]
            pen.line(big(grain), fill=mix(base, (96, 58, 34), dice.uniform(0.1, 0.6)), width=2)
        pen.line(big([(0, top), (WIDTH, top)]), fill=(92, 58, 36), width=3)
        joint = dice.uniform(20, WIDTH - 20)
        pen.line(big([(joint, top), (joint, top + depth)]), fill=(92, 58, 36), width=3)
        top += depth
    pen.rectangle([*big([(0, floor - 9)])[0], *big([(WIDTH, floor)])[0]], fill=(236, 232, 220))
    pen.line(big([(0, floor - 7), (WIDTH, floor - 7)]), fill=(206, 202, 190), width=3)

    rings = [(150, 52, 62), (224, 190, 140), (58, 92, 112), (224, 190, 140), (172, 72, 74)]
    for ring, colour in enumerate(rings):
        disc(pen, 128, 284, 118 - ring * 8, 30 - ring * 4, colour)
    for _ in range(2600):
        turn, reach = dice.uniform(0, math.tau), math.sqrt(dice.random())
        x, y = 128 + 116 * reach * math.cos(turn), 284 + 29 * reach * math.sin(turn)
        under = image.getpixel((int(x * ZOOM), int(y * ZOOM)))
        tint = mix(under, (255, 255, 255) if dice.random() < 0.5 else (40, 20, 20), 0.2)
        pen.line(big([(x, y), (x + dice.uniform(-1.5, 1.5), y + 1.5)]), fill=tint, width=2)


def draw_plant(image: Image.Image) -> None:
    pen = ImageDraw.Draw(image)
    leaves = [(-62, 64), (-36, 82), (-12, 92), (14, 88), (38, 74), (60, 56)]
    for order, (lean, reach) in enumerate(leaves):
        turn = math.radians(lean)
        tip = (222 + reach * math.sin(turn), 190 - reach * math.cos(turn))
        side = (math.cos(turn) * 9, math.sin(turn) * 9)
        middle = ((222 + tip[0]) / 2, (190 + tip[1]) / 2)
        left = (middle[0] - side[0], middle[1] - side[1])
        right = (middle[0] + side[0], middle[1] + side[1])
        green = mix((52, 110, 66), (104, 160, 84), order / 5)
        pen.polygon(big(curve([(222, 192), left, tip, right])), fill=green)
        pen.line(big([(222, 190), tip]), fill=mix(green, (210, 230, 160), 0.5), width=3)
        for rib in (0.35, 0.5, 0.65, 0.8):
            x, y = 222 + (tip[0] - 222) * rib, 190 + (tip[1] - 190) * rib
            for way in (-0.5, 0.5):
                end = (x + side[0] * way + (tip[0] - x) * 0.2, y + side[1] * way - 3)
                pen.line(big([(x, y), end]), fill=mix(green, (210, 230, 160), 0.35), width=2)
    pen.polygon(big([(200, 192), (246, 192), (239, 244), (207, 244)]), fill=(190, 98, 66))
    pen.polygon(big([(228, 192), (246, 192), (239, 244), (229, 244)]), fill=(164, 80, 54))
    pen.rectangle([*big([(197, 184)])[0], *big([(249, 197)])[0]], fill=(206, 112, 78))
    pen.line(big([(197, 197), (249, 197)]), fill=(140, 66, 44), width=4)
    for x in range(206, 234, 8):
        pen.line(big([(x + 1, 214), (x + 5, 208), (x + 9, 214)]), fill=(240, 196, 150), width=5)


def stroke_fur(
    image: Image.Image, mask: Image.Image, centre: Point, count: int, dice: random.Random
) -> None:
    """Comb short hairs, away from the centre, over the masked part."""
    pen = ImageDraw.Draw(image)
    left, top, right, bottom = mask.getbbox() or (0, 0, 1, 1)
    for _ in range(count):
        x, y = dice.uniform(left, right - 1), dice.uniform(top, bottom - 1)
        turn = math.atan2(y / ZOOM - centre[1], x / ZOOM - centre[0]) + dice.uniform(-0.5, 0.5)
        length = dice.uniform(2, 5) * ZOOM
        bright = dice.uniform(-0.3, 0.3)
        end = (x + length * math.cos(turn), y + length * math.sin(turn))
        if not mask.getpixel((int(x), int(y))):
            continue
        inside = 0 <= end[0] < image.width and 0 <= end[1] < image.height
        if not inside or not mask.getpixel((int(end[0]), int(end[1]))):
            continue
        under = image.getpixel((int(x), int(y)))
        tint = mix(under, (255, 244, 220) if bright > 0 else (70, 30, 8), abs(bright))
        pen.line([(x, y), end], fill=tint, width=2)


def paint(image: Image.Image, mask: Image.Image, colour: Colour, light: Point) -> None:
    """Fill the mask, brighter towards the light, darker at the far edge."""
    image.paste(colour, (0, 0), mask)
    high = empty_mask()
    disc(ImageDraw.Draw(high), *light, 30, 34, 150)
    shade(image, ImageChops.multiply(high.filter(ImageFilter.GaussianBlur(60)), mask), LIGHT, 0)
    inner = mask.filter(ImageFilter.GaussianBlur(7 * ZOOM)).point(lambda value: 255 - value)
    rim = ImageChops.multiply(inner.point(lambda value: value * 9 // 10), mask)
    shade(image, rim, mix(colour, LINE, 0.6), 0)


def stripe(image: Image.Image, mask: Image.Image, lines: Sequence[Sequence[Point]]) -> None:
    """Draw tapering dark stripes, kept within the mask."""
    marks = empty_mask()
    pen = ImageDraw.Draw(marks)
    for line in lines:
        path = curve(line, steps=24, closed=False)
        for place, (x, y) in enumerate(path):
            radius = 0.6 + 2.6 * math.sin(math.pi * min(1, 0.12 + place / len(path)))
            disc(pen, x, y, radius, radius, 215)
    shade(image, ImageChops.multiply(marks.filter(ImageFilter.GaussianBlur(3)), mask), DARK, 0)


def draw_body(image: Image.Image, dice: random.Random) -> None:
    shadow = empty_mask()
    disc(ImageDraw.Draw(shadow), 134, 288, 82, 14, 170)
    shade(image, shadow, (40, 20, 20), 5)

    tail_line = curve(
        [(182, 268), (206, 276), (214, 288), (196, 298), (160, 299), (136, 294)], closed=False
    )
    tail, tip = empty_mask(), empty_mask()
    for place, (x, y) in enumerate(tail_line):
        radius = 9.5 - 3 * place / len(tail_line)
        disc(ImageDraw.Draw(tail), x, y, radius, radius, 255)
        if place > 0.82 * len(tail_line):
            disc(ImageDraw.Draw(tip), x, y, radius, radius, 255)

    body = empty_mask()
    half = [
        (128, 138),
        (98, 142),
        (86, 166),
        (80, 200),
        (62, 230),
        (58, 262),
        (72, 286),
        (104, 290),
    ]
    outline = [*half, *reversed(mirrored(half[1:]))]
    ImageDraw.Draw(body).polygon(big(curve(outline)), fill=255)
    paint(image, body, FUR, (104, 190))
    flanks = [
        [(62, 226), (76, 222), (88, 228)],
        [(57, 242), (74, 236), (90, 244)],
        [(56, 258), (72, 252), (86, 260)],
        [(80, 188), (90, 186), (98, 192)],
        [(80, 204), (90, 202), (99, 208)],
        [(86, 166), (95, 168), (102, 174)],
    ]
    stripe(image, body, [*flanks, *(mirrored(flank) for flank in flanks)])
    stroke_fur(image, body, (128, 120), 9000, dice)

    chest = empty_mask()
    bib = [(128, 146), (106, 152), (104, 178), (113, 206), (128, 226)]
    ImageDraw.Draw(chest).polygon(big(curve([*bib, *reversed(mirrored(bib[1:-1]))])), fill=255)
    shade(image, chest, CREAM, 2.5)
    stroke_fur(image, chest, (128, 120), 2600, dice)

    for flip in (list, mirrored):
        leg = empty_mask()
        shape = [(106, 204), (102, 236), (101, 268), (103, 284), (114, 290), (125, 284), (126, 236)]
        ImageDraw.Draw(leg).polygon(big(curve(flip(shape))), fill=255)
        paint(image, leg, FUR, (112, 230))
        bands = [[(98, 226), (108, 230), (114, 228)], [(98, 242), (108, 246), (116, 244)]]
        stripe(image, leg, [flip(band) for band in bands])
        stroke_fur(image, leg, (128, 120), 1600, dice)
        for x, y, rx, ry in ((78, 285, 19, 8.5), (112, 283, 15, 9.5)):
            paw, top = empty_mask(), empty_mask()
            disc(ImageDraw.Draw(paw), *flip([(x, y)])[0], rx, ry, 255)
            disc(ImageDraw.Draw(top), *flip([(x, y - 2.5)])[0], rx - 2, ry - 3, 255)
            image.paste(mix(CREAM, DARK, 0.35), (0, 0), paw)
            shade(image, top, CREAM, 2)
        pen = ImageDraw.Draw(image)
        for toe in (106, 112, 118):
            pen.line(big(flip([(toe, 284), (toe, 290)])), fill=(150, 112, 92), width=4)
        for toe in (72, 79):
            pen.line(big(flip([(toe, 286), (toe - 1, 291)])), fill=(150, 112, 92), width=4)

    paint(image, tail, FUR, (190, 284))
    rings = [[(x, y - 10), (x + 2, y), (x, y + 10)] for x, y in tail_line[8::9]]
    stripe(image, tail, rings)
    image.paste(CREAM, (0, 0), tip)
    stroke_fur(image, tail, (170, 260), 1800, dice)


def draw_head(image: Image.Image, dice: random.Random) -> None:
    shadow = empty_mask()
    disc(ImageDraw.Draw(shadow), 128, 152, 27, 11, 150)
    shade(image, shadow, (96, 48, 16), 2.5)

    shape = [(82, 92), (80, 66), (84, 38), (104, 52), (120, 72)]
    for flip in (list, mirrored):
        ear = empty_mask()
        ImageDraw.Draw(ear).polygon(big(curve(flip(shape))), fill=255)
        paint(image, ear, FUR, (90, 50))
        stroke_fur(image, ear, (128, 110), 900, dice)
        inside = empty_mask()
        inner = [(89, 82), (87, 66), (89, 50), (101, 60), (109, 74)]
        ImageDraw.Draw(inside).polygon(big(curve(flip(inner))), fill=255)
        shade(image, inside, PINK, 1)
        pen = ImageDraw.Draw(image)
        for hair in range(9):
            root = (88 + hair * 1.4, 84 - hair * 0.4)
            tip = (90 + hair * 2, 64 + abs(hair - 3) * 1.5)
            pen.line(big(flip([root, tip])), fill=(250, 222, 200), width=3)

    head = empty_mask()
    half = [(128, 62), (102, 66), (82, 84), (72, 108), (78, 132), (100, 148), (128, 152)]
    outline = curve([*half, *reversed(mirrored(half[1:-1]))])
    ImageDraw.Draw(head).polygon(big(outline), fill=255)
    paint(image, head, FUR, (108, 84))
    forehead = [[(128, 62), (128, 74), (128, 86)], [(115, 63), (117, 74), (121, 84)]]
    cheek = [[(72, 112), (82, 113), (92, 118)], [(75, 124), (85, 124), (94, 127)]]
    brow = [[(101, 67), (105, 76), (112, 84)]]
    sides = [*forehead[1:], *cheek, *brow]
    stripe(image, head, [*forehead[:1], *sides, *(mirrored(line) for line in sides)])
    stroke_fur(image, head, (128, 112), 6500, dice)

    muzzle = empty_mask()
    pen = ImageDraw.Draw(muzzle)
    for x in (115, 141):
        disc(pen, x, 130, 17, 13, 255)
    disc(pen, 128, 142, 14, 9, 255)
    pen.polygon(big([(128, 84), (120, 122), (136, 122)]), fill=255)
    shade(image, ImageChops.multiply(muzzle, head), CREAM, 1.6)
    stroke_fur(image, muzzle, (128, 118), 1100, dice)
    draw_face(image)


def draw_face(image: Image.Image) -> None:
    pen = ImageDraw.Draw(image)
    for x, way in ((104, 1), (152, -1)):
        corner = [(x - 14, 107 - way), (x, 93), (x + 14, 107 + way), (x, 120)]
        pen.polygon(big(curve(corner)), fill=LINE)
        lid = empty_mask()
        shape = [(x - 12, 107 - way), (x, 95), (x + 12, 107 + way), (x, 118)]
        ImageDraw.Draw(lid).polygon(big(curve(shape)), fill=255)
        image.paste((150, 186, 74), (0, 0), lid)
        for ray in range(40):
            turn = math.tau * ray / 40
            spoke = [(x + r * math.cos(turn), 107 + r * math.sin(turn)) for r in (4, 9)]
            tint = (206, 214, 110) if ray % 2 else (104, 144, 58)
            if all(lid.getpixel((int(a), int(b))) for a, b in big(spoke)):
                pen.line(big(spoke), fill=tint, width=3)
        disc(pen, x, 107, 5.4, 9.5, (22, 18, 16))
        disc(pen, x - 3, 102.5, 2.6, 2.8, (255, 255, 255))
        disc(pen, x + 3, 112, 1.3, 1.3, (230, 240, 220))
    pen.polygon(big(curve([(119, 121), (128, 119), (137, 121), (131, 128), (125, 128)])), fill=NOSE)
    disc(pen, 125, 121.8, 2.2, 1, (240, 176, 170))
    pen.line(big([(128, 129), (128, 134)]), fill=LINE, width=5)
    smile = [(128, 134), (122, 139), (113, 138)]
    for side in (smile, mirrored(smile)):
        pen.line(big(curve(side, closed=False)), fill=LINE, width=5, joint="curve")
    for dot in ((110, 128), (106, 132), (113, 133)):
        for x, y in (dot, *mirrored([dot])):
            disc(pen, x, y, 1, 1, (150, 104, 80))
    for end in ((48, 118), (44, 130), (50, 143)):
        whisker = [(108, 130), (80, (end[1] + 124) / 2 - 1), end]
        for side in (whisker, mirrored(whisker)):
            pen.line(big(curve(side, closed=False)), fill=(255, 252, 244), width=3)
    for tip in ((94, 78), (100, 76)):
        brow = [(106, 92), tip]
        for side in (brow, mirrored(brow)):
            pen.line(big(side), fill=(255, 250, 240), width=2)


def draw_cat() -> Image.Image:
    """Return the picture, 256 x 320 pixels, the same on every call."""
    dice = random.Random(5)
    image = Image.new("RGB", (WIDTH * ZOOM, HEIGHT * ZOOM))
    draw_room(image, dice)
    draw_plant(image)
    draw_body(image, dice)
    draw_head(image, dice)
    return image.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS)


if __name__ == "__main__":
    draw_cat().save(Path(__file__).with_name("cat.png"))
