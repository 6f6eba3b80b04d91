"""Presets: what they say, that nothing a number depends on escapes their hash, and what they make of a data set."""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms
from torchvision.transforms import InterpolationMode

import clipdefense as cd
from clipdefense import ZeroShotClassifier, attacks, evaluate
from clipdefense.attacks.autoattack import autoattack, stages_of
from clipdefense.data import DatasetRule, Protocol, Resize, Subset, from_arrays, get_protocol, list_protocols
from clipdefense.data.protocols import sha256_of
from clipdefense.errors import UsageError
from clipdefense.evaluation.runner import AttackSpec, parse_attacks
from clipdefense.threat import ThreatModel

PRESETS = ("clipdefense-1", "robustvlm-1k", "tecoa-native", "tga-224", "ttc-224")
SMALL = ("cifar10", "cifar100", "stl10")


def a_protocol(**changes: object) -> Protocol:
    rule = DatasetRule("photos", templates=("a photo of a {}.",))
    given = {"threats": (ThreatModel("linf", 1 / 255),), "attacks": ("pgd",), "rules": (rule,)}
    return Protocol(**({"name": "mine", "title": "mine", "reader": "folder"} | given | changes))  # type: ignore[arg-type]


def test_the_presets_are_these() -> None:
    assert list_protocols() == PRESETS
    with pytest.raises(UsageError, match="protocol 'ttc' is unknown; did you mean"):
        get_protocol("ttc")


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_immutable_hashable_and_json(name: str) -> None:
    protocol = get_protocol(name)
    with pytest.raises(FrozenInstanceError):
        protocol.name = "other"  # type: ignore[misc]
    assert {protocol: 1}[get_protocol(name)] == 1
    again = Protocol.from_dict(json.loads(json.dumps(protocol.to_dict())))
    assert again == protocol and again.hash == protocol.hash and len(protocol.hash) == 64


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_can_be_run(name: str) -> None:
    protocol = get_protocol(name)
    assert protocol.notes and protocol.source and set(protocol.headline) <= set(protocol.datasets)
    for threat in protocol.threats:
        for dataset in protocol.datasets:
            assert parse_attacks(protocol.attacks_on(dataset), threat)
            assert parse_attacks(protocol.attacks_on(dataset, randomized=True), threat)
            assert protocol.rule(dataset).templates or protocol.folders  # else the prompts lie with the images


def test_hashes_differ_and_follow_what_numbers_depend_on_alone() -> None:
    assert len({get_protocol(name).hash for name in PRESETS}) == len(PRESETS)
    protocol = get_protocol("ttc-224")
    first = replace(protocol.rules[0], templates=("a photo of a {}",))
    changes = [
        {"rules": (first, *protocol.rules[1:])},
        {"rules": (replace(protocol.rules[0], resize=Resize(224)), *protocol.rules[1:])},
        {"threats": protocol.threats[:1]},
        {"attacks": ("pgd,steps=20",)},
        {"subset": Subset(10)},
        {"cumulative": True},
        {"headline": protocol.headline[1:]},
        {"means": (("other", protocol.headline[1:]),)},
    ]
    assert protocol.hash not in [replace(protocol, **change).hash for change in changes]  # type: ignore[arg-type]
    assert replace(protocol, title="other", notes=(), source="elsewhere").hash == protocol.hash


def test_resolutions_are_the_published_ones() -> None:
    tecoa, tga, ttc, vlm = (get_protocol(name) for name in ("tecoa-native", "tga-224", "ttc-224", "robustvlm-1k"))
    centre = Resize(256, 224, "bilinear")
    for small in SMALL:
        assert tecoa.rule(small).resize.attack_at is None and vlm.rule(small).resize.attack_at is None
        assert tga.rule(small).resize == Resize(224, interpolation="bilinear", squash=True)
        assert ttc.rule(small).resize == centre
    assert {p.rule("eurosat").resize for p in (tecoa, tga, ttc)} == {centre}
    assert vlm.rule("pets").resize == Resize(224)
    assert {rule.resize.attack_at for rule in get_protocol("clipdefense-1").rules} == {224}


def test_attacks_radii_sets_and_splits_are_the_published_ones() -> None:
    tecoa, tga, ttc, vlm, own = (
        get_protocol(name) for name in ("tecoa-native", "tga-224", "ttc-224", "robustvlm-1k", "clipdefense-1")
    )
    assert [[round(t.eps * 255) for t in p.threats] for p in (tecoa, tga, ttc, vlm)] == [
        [1],
        [1, 2, 4],
        [1, 4],
        [1, 2, 4],
    ]
    assert tga.attacks[0].startswith("pgd,steps=100,step_size=1/255")
    assert ttc.attacks[0].startswith("pgd,steps=10,step_size=1/255")
    assert vlm.attacks == ("apgd-ce,restarts=5", "apgd-t,targets=9") and vlm.cumulative
    assert vlm.attacks_on("pcam") == ("apgd-ce,restarts=5",) and vlm.subset == Subset(1000, "uniform", 0)
    assert "tiny-imagenet" not in ttc.headline and len(ttc.headline) == 16 and "country211" in ttc.headline
    assert "country211" not in tga.datasets and len(tga.headline) == 16 and len(vlm.headline) == 13
    for name in ("caltech101", "caltech256", "sun397", "eurosat"):
        assert {p.rule(name).split for p in (tecoa, tga, ttc, own)} == {"all"}
    assert {p.rule("imagenet").split for p in (tecoa, tga, ttc, own)} == {"val"}
    assert own.cumulative and own.adaptive and "autoattack" in own.attacks
    assert "autoattack,version=rand" in own.attacks_on("cifar10", randomized=True)


def test_autoattack_is_the_published_pair_of_attacks() -> None:
    """One row, of what APGD-CE and APGD-DLR both leave standing, and none besides that no publication has."""
    pair = [("apgd-ce", {"steps": 100}), ("apgd-dlr", {"steps": 100})]
    for name in ("tecoa-native", "tga-224", "ttc-224"):
        protocol = get_protocol(name)
        for dataset in protocol.datasets:
            alone = dataset == "pcam" and name != "tecoa-native"  # published there with APGD-CE alone
            for randomized in (False, True):
                *pgd, last = protocol.attacks_on(dataset, randomized=randomized)
                function, _, options = AttackSpec.parse(last).bind(protocol.threats[0])
                assert [AttackSpec.parse(attack).name for attack in pgd] == ["pgd", "pgd"]
                if alone:
                    assert last == "apgd-ce"
                    continue
                assert function is autoattack
                stages = [(stage, settings) for stage, _, settings in stages_of(**options)]
                drawn = {"eot": 20, "early_stop": False} if randomized else {}
                assert stages == [(stage, settings | drawn) for stage, settings in pair]


def test_pmg_afts_mean_has_its_own_data_sets() -> None:
    tecoa = get_protocol("tecoa-native")
    ((name, datasets),) = tecoa.means
    assert name == "PMG-AFT" and len(datasets) == len(tecoa.headline) == 16
    assert set(datasets) ^ set(tecoa.headline) == {"tiny-imagenet", "country211"} and "country211" in tecoa.headline
    assert set(datasets) == set(get_protocol("tga-224").headline)
    said = " ".join(tecoa.notes)
    assert "PMG-AFT's AutoAttack is the standard version" in said
    assert "PMG-AFT's prompt for Caltech-101 is another, A photo of a {}." in said


def test_the_pair_on_the_undefended_model_is_the_same_attack_whether_a_defence_draws_or_not(
    tiny_model: ZeroShotClassifier, images: torch.Tensor, labels: torch.Tensor
) -> None:
    """So that a published transfer number of a defence that draws is made as published."""
    threat, protocol = ThreatModel("linf", 1 / 255), get_protocol("ttc-224")
    defense = cd.get_defense("random-noise")(tiny_model, eps=0.0)
    plain, drawn = (protocol.attacks_on("cifar10", randomized=randomized)[-1] for randomized in (False, True))
    kept = evaluate(tiny_model, images, labels, threat, attacks=[drawn], defense=defense, eot=1, keep_adversarial=True)
    made = next(row.adversarial for row in kept.rows if row.kind == "transfer")
    alone = attacks.autoattack(
        tiny_model, images, labels, threat, **dict(AttackSpec.parse(plain).options), early_stop=False
    )
    assert made is not None and torch.equal(made, images + (alone - images))
    with pytest.raises(UsageError, match="write autoattack,version=rand"):
        evaluate(tiny_model, images, labels, threat, attacks=[plain], defense=defense)


def test_prompts() -> None:
    assert get_protocol("tecoa-native").templates("cifar10") == ("This is a photo of a {}",)
    assert get_protocol("ttc-224").templates("cifar10") == ("This is a photo of a {}.",)
    assert get_protocol("tga-224").templates("fgvc-aircraft") == ("A photo of a {}, a type of aircraft.",)
    ensemble = get_protocol("robustvlm-1k").templates("imagenet1k")
    assert len(ensemble) == 80 and "itap of a {}." in ensemble
    with pytest.raises(UsageError, match="prompts of 'pets' lie with its images"):
        get_protocol("robustvlm-1k").templates("pets")
    with pytest.raises(
        UsageError, match=r"^protocol 'ttc-224': data set 'cifar-10' is unknown; did you mean 'cifar10'"
    ):
        get_protocol("ttc-224").templates("cifar-10")


def test_prompts_from_elsewhere_must_be_the_ones_that_were_meant() -> None:
    where = "open_clip.zero_shot_metadata:SIMPLE_IMAGENET_TEMPLATES"
    content = a_protocol().to_dict()
    content["rules"][0]["templates"] = {"from": where, "sha256": "0" * 64}
    with pytest.raises(UsageError, match=r"SIMPLE_IMAGENET_TEMPLATES, the prompts of .*hash differs"):
        Protocol.from_dict(content)


def test_mistakes_in_a_protocol_are_named() -> None:
    content = a_protocol().to_dict()
    with pytest.raises(UsageError, match=r"^protocol 'mine': key 'atacks' is unknown; did you mean 'attacks'"):
        Protocol.from_dict(content | {"atacks": []})
    with pytest.raises(UsageError, match="protocol 'mine' is not complete"):
        Protocol.from_dict({key: value for key, value in content.items() if key != "reader"})
    with pytest.raises(UsageError, match="lacks data sets, threats or attacks"):
        a_protocol(attacks=())
    with pytest.raises(
        UsageError, match=r"^protocol 'mine': headline data set 'photo' is unknown; did you mean 'photos'"
    ):
        a_protocol(headline=("photo",))
    with pytest.raises(UsageError, match=r"^protocol 'mine': data set of the mean 'other' 'photo' is unknown; did you"):
        a_protocol(means=(("other", ("photo",)),))
    with pytest.raises(UsageError, match=r"text with \{\} is expected"):
        DatasetRule("photos", templates=("a photo",))
    with pytest.raises(UsageError, match="a crop is at most the side"):
        Resize(224, 256)
    with pytest.raises(UsageError, match="interpolation 'nearest' is unknown"):
        Resize(224, interpolation="nearest")  # type: ignore[arg-type]


def test_subsets_are_drawn_as_they_say() -> None:
    labels = np.repeat([0, 1], [90, 10])
    images = from_arrays(np.zeros((100, 4, 4, 3), np.uint8), labels)
    assert Subset(20).of(images).labels.tolist() == [0] * 10 + [1] * 10
    uniform = Subset(20, "uniform", 3).of(images)
    assert uniform.ids.tolist() == sorted(set(uniform.ids.tolist())) and (uniform.labels == 1).sum() < 10
    assert torch.equal(uniform.ids, Subset(20, "uniform", 3).of(images).ids)
    assert len(Subset(1000).of(images)) == 100


@pytest.mark.parametrize("shape", [(300, 400), (500, 260), (32, 32), (224, 224)])
@pytest.mark.parametrize(
    ("rule", "theirs"),
    [
        (Resize(256, 224, "bilinear"), [transforms.Resize(256), transforms.CenterCrop(224)]),
        (Resize(224), [transforms.Resize(224, InterpolationMode.BICUBIC), transforms.CenterCrop(224)]),
        (Resize(224, interpolation="bilinear", squash=True), [transforms.Resize((224, 224))]),
        (Resize(), []),
    ],
    ids=str,
)
def test_resize_rules_are_torchvisions(shape: tuple[int, int], rule: Resize, theirs: list[object]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    ours = rule(image)
    assert isinstance(ours, Image.Image)
    assert np.array_equal(np.asarray(ours), np.asarray(transforms.Compose(theirs)(image)))
    if rule.side is not None:
        # Pillow clips between its two passes, so the comparison needs pixels that overshoot nowhere
        pixels = 64 + pixels // 2
        ours = rule(Image.fromarray(pixels))
        floats = rule(torch.from_numpy(pixels).permute(2, 0, 1).float() / 255)
        assert isinstance(floats, torch.Tensor) and floats.shape[1:] == (224, 224)
        expected = torch.from_numpy(np.array(ours)).permute(2, 0, 1) / 255
        assert (floats - expected).abs().max() < 1.5 / 255


def test_a_protocol_of_ones_own(tmp_path: Path) -> None:
    for name, level in (("cat", 10), ("dog", 200)):
        (tmp_path / "set photos" / name).mkdir(parents=True)
        for i in range(3):
            Image.new("RGB", (40, 30), (level, i, 0)).save(tmp_path / "set photos" / name / f"{i}.png")
    rule = DatasetRule("photos", templates=("a photo of a {}.",), resize=Resize(20, 16))
    protocol = a_protocol(rules=(rule,), folders=("{}", "set {}"), page="https://example.org", subset=Subset(4))
    images = protocol.dataset("photos", tmp_path)
    assert len(images) == 4 and len(protocol.dataset("photos", tmp_path, subset=False)) == 6
    assert images[0][0].shape == (3, 16, 16) and images.classes == ("cat", "dog")
    assert images.meta["protocol_sha256"] == protocol.hash
    assert images.meta["class_names_sha256"] == sha256_of(["cat", "dog"])
    assert images.meta["resize"] == "shorter side to 20, bicubic, centre 16"
    assert protocol.templates(images) == protocol.templates("photos") == ("a photo of a {}.",)
    with pytest.raises(UsageError, match=r"'photos' is not there: looked for .*set photos.*https://example\.org"):
        protocol.dataset("photos", tmp_path / "elsewhere")
