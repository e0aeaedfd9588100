"""Compare parameters with a second, independent transcription.

At 224 px, the comparison with the code of ImageNet-C detects a wrong parameter. For 64 and 32 px
there is no package to compare with. Each row lists the severities 1 to 5. The parameters of
elastic_transform are fractions of the side, as published.
"""

import pytest
import torch

from corruptions import SEVERITIES, blur, digital, frost, noise, weather

CIFAR_10_C = {
    noise: {
        "GAUSSIAN_NOISE": ".04 .06 .08 .09 .10",
        "SHOT_NOISE": "500 250 100 75 50",
        "IMPULSE_NOISE": ".01 .02 .03 .05 .07",
        "SPECKLE_NOISE": ".06 .1 .12 .16 .2",
    },
    blur: {
        "GAUSSIAN_BLUR": ".4 .6 .7 .8 1",
        "DEFOCUS_BLUR": ".3 .4  .4 .5  .5 .6  1 .2  1.5 .1",
        "GLASS_BLUR": ".05 1 1  .25 1 1  .4 1 1  .25 1 2  .4 1 2",
        "MOTION_BLUR": "6 1  6 1.5  6 2  8 2  9 2.5",
        "ZOOM_BLUR": "1.06 .01  1.11 .01  1.16 .01  1.21 .01  1.26 .01",
    },
    weather: {
        "SNOW": ".1 .2 1 .6 8 3 .95  .1 .2 1 .5 10 4 .9  .15 .3 1.75 .55 10 4 .9"
        "  .25 .3 2.25 .6 12 6 .85  .3 .3 1.25 .65 14 12 .8",
        "FROST": "1 .2  1 .3  .9 .4  .85 .4  .75 .45",
        "FOG": ".2 3  .5 3  .75 2.5  1 2  1.5 1.75",
        "BRIGHTNESS": ".05 .1 .15 .2 .3",
    },
    digital: {
        "CONTRAST": ".75 .5 .4 .3 .15",
        "ELASTIC_TRANSFORM": "0 0 .08  .05 .2 .07  .08 .06 .06  .1 .04 .05  .1 .03 .03",
        "PIXELATE": ".95 .9 .85 .75 .65",
        "JPEG_COMPRESSION": "80 65 58 50 40",
        "SATURATE": ".3 0  .1 0  1.5 0  2 .1  2.5 .2",
    },
}
TINY_IMAGENET_C = {
    noise: {
        "GAUSSIAN_NOISE": ".04 .08 .12 .15 .18",
        "SHOT_NOISE": "250 100 50 30 15",
        "IMPULSE_NOISE": ".01 .02 .05 .08 .14",
        "SPECKLE_NOISE": ".15 .2 .25 .3 .35",
    },
    blur: {
        "GAUSSIAN_BLUR": ".5 .75 1 1.25 1.5",
        "DEFOCUS_BLUR": ".5 .6  1 .1  1.5 .1  2.5 .01  3 .1",
        "GLASS_BLUR": ".1 1 1  .5 1 1  .6 1 2  .7 2 1  .9 2 2",
        "MOTION_BLUR": "10 1  10 1.5  10 2  10 2.5  12 3",
        "ZOOM_BLUR": "1.06 .01  1.11 .01  1.16 .01  1.21 .01  1.26 .01",
    },
    weather: {
        "SNOW": ".1 .2 1 .6 8 3 .8  .1 .2 1 .5 10 4 .8  .15 .3 1.75 .55 10 4 .7"
        "  .25 .3 2.25 .6 12 6 .65  .3 .3 1.25 .65 14 12 .6",
        "FROST": "1 .3  .9 .4  .8 .45  .75 .5  .7 .55",
        "FOG": ".4 3  .7 3  1 2.5  1.5 2  2 1.75",
        "BRIGHTNESS": ".1 .2 .3 .4 .5",
    },
    digital: {
        "CONTRAST": ".4 .3 .2 .1 .05",
        "ELASTIC_TRANSFORM": "0 0 .08  .05 .3 .06  .1 .08 .06  .1 .03 .03  .16 .03 .02",
        "PIXELATE": ".9 .8 .7 .6 .5",
        "JPEG_COMPRESSION": "65 58 50 40 25",
        "SATURATE": ".3 0  .1 0  2 0  5 .1  30 .2",
    },
}
# The validation corruptions are not compared with the code of ImageNet-C.
IMAGENET_C = {
    noise: {"SPECKLE_NOISE": ".15 .2 .35 .45 .6"},
    blur: {"GAUSSIAN_BLUR": "1 2 3 4 6"},
    digital: {"SATURATE": ".3 0  .1 0  2 0  5 .1  20 .2"},
}
CASES = [
    (module, name, side, text)
    for side, tables in ((32, CIFAR_10_C), (64, TINY_IMAGENET_C), (224, IMAGENET_C))
    for module, rows in tables.items()
    for name, text in rows.items()
]


@pytest.mark.parametrize(("module", "name", "side", "text"), CASES)
def test_parameters_are_the_published_ones(module, name, side, text):
    rows, share = getattr(module, name)[side], 1
    if name == "ELASTIC_TRANSFORM":
        rows, share = [digital._elastic_lengths(severity, side) for severity in SEVERITIES], side
    ours = torch.tensor(rows, dtype=torch.float64)
    published = share * torch.tensor([float(word) for word in text.split()], dtype=torch.float64)
    assert len(ours) == 5
    torch.testing.assert_close(ours.flatten(), published, rtol=1e-12, atol=0)


def test_frost_is_shrunk_as_published():
    assert frost._SHRINK == {224: 1.0, 64: 0.3, 32: 0.2}


# Percentiles 1, 5, 25, 50, 75, 95 and 99 of R, G and B of ImageNet-C's photographs, by number.
PHOTOGRAPHS = {
    1: "31 40 57 74 95 127 150  116 123 137 148 160 178 190  134 141 155 166 176 191 202",
    2: "138 162 189 204 216 230 241  140 165 193 209 221 235 245  146 172 202 218 231 244 250",
    4: "69 91 120 138 155 183 218  84 105 135 153 170 199 234  92 115 147 165 183 214 249",
    5: "34 48 79 107 140 195 233  45 60 91 119 151 203 238  57 72 104 131 161 211 243",
}
# Means of G over 4 x 4 parts of each texture, as drawn when the benchmark was first measured. A
# different drawing changes the frost of every user, so that a change must be intended.
DRAWN = [
    "126 130 140 142 138 143 155 142 159 165 172 156 150 153 155 159",
    "204 179 210 221 204 191 209 217 196 200 220 214 206 190 211 215",
    "187 208 201 191 195 205 216 217 204 196 218 222 194 214 209 210",
    "140 133 134 154 157 154 142 157 170 168 157 173 154 149 143 157",
    "151 108 131 166 124 92 118 151 111 104 93 139 134 102 107 143",
]


@pytest.mark.parametrize(("number", "photograph"), list(enumerate((1, 2, 2, 4, 5))))
def test_drawn_frost_has_the_photographs_levels_and_stays_as_it_is(number, photograph):
    texture = frost._pictures("procedural")[number].double()
    shares = torch.tensor([1, 5, 25, 50, 75, 95, 99]).double() / 100
    levels = texture.flatten(1).quantile(shares, dim=1).T.flatten()
    published = torch.tensor([float(word) for word in PHOTOGRAPHS[photograph].split()]).double()
    torch.testing.assert_close(levels, published, rtol=0, atol=0.5)
    means = texture[1].unflatten(0, (4, -1)).unflatten(2, (4, -1)).mean((1, 3)).flatten()
    drawn = torch.tensor([float(word) for word in DRAWN[number].split()]).double()
    torch.testing.assert_close(means, drawn, rtol=0, atol=0.6)


# The darkest and the lightest values of R, G and B of these photographs.
EXTREMES = {
    1: "20 190 100 215 118 225",
    2: "100 252 102 254 107 255",
    4: "40 245 50 252 58 255",
    5: "20 252 30 254 38 255",
}


@pytest.mark.parametrize(("number", "photograph"), list(enumerate((1, 2, 2, 4, 5))))
def test_drawn_frost_is_as_dark_and_as_light_as_the_photographs(number, photograph):
    texture = frost._pictures("procedural")[number].flatten(1)
    found = torch.stack(texture.aminmax(dim=1), 1).flatten().tolist()
    assert found == [int(word) for word in EXTREMES[photograph].split()]
