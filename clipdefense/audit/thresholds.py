"""The one table of the audit: what each check measures, from where on it warns, from where on the number is invalid.

The thresholds were fixed before any of them was tried. The page docs/audit.md shows this table, and a test keeps the
two equal.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Verdict(enum.IntEnum):
    """What a check says, mildest first."""

    SKIPPED = 0
    PASS = 1
    WARN = 2
    INVALID = 3


CHECKS = {
    1: "input gradients",
    2: "finite differences",
    3: "precision",
    4: "determinism",
    5: "batch coupling",
    6: "optimisation in forward",
    7: "identity in disguise",
    8: "transfer",
    9: "black box",
    10: "eps sweep",
    11: "more steps",
    12: "best and last iterate",
    13: "robust above clean",
    14: "random noise",
    15: "adaptive views",
    16: "binarization",
    17: "loss slice",
    18: "8-bit images",
    19: "threat model",
    20: "intervals",
}


@dataclass(frozen=True)
class Statistic:
    """One row of the table.

    Attributes:
        key: its name in results.
        check: number of the check it belongs to, 1 to 20.
        what: what is measured.
        warn: worse than this is WARN; None never warns.
        invalid: worse than this is INVALID; None never is.
        advice: what to do about it, one sentence.
        low_is_bad: worse means below the threshold, as for p-values.
    """

    key: str
    check: int
    what: str
    warn: float | None
    invalid: float | None
    advice: str
    low_is_bad: bool = False

    def verdict(self, value: float) -> Verdict:
        """PASS, WARN or INVALID; a NaN is INVALID where anything is, else WARN."""
        for threshold, verdict in ((self.invalid, Verdict.INVALID), (self.warn, Verdict.WARN)):
            if threshold is not None and not (value >= threshold if self.low_is_bad else value <= threshold):
                return verdict
        return Verdict.PASS

    def limits(self) -> tuple[str, str]:
        """Both thresholds as text, such as ``("> 0.02", "> 0.1")``."""
        sign = "<" if self.low_is_bad else ">"
        return tuple("never" if limit is None else f"{sign} {limit:g}" for limit in (self.warn, self.invalid))  # type: ignore[return-value]


_P = "one-sided McNemar p that {}"
_LEAST = ", the least over the {} times their number"

STATISTICS = (
    Statistic(
        "unusable_gradients",
        1,
        "largest share of images, over the clean ones, noisy ones and those an attack ended at, whose cross-entropy "
        "has no input gradient, a zero one, or one with NaN (or whose logits are not finite); with adaptive views, of "
        "the view where it is least",
        0.02,
        0.1,
        "Return plain logits that depend on the input differentiably; wrap what cannot be differentiated in a defence "
        "with adaptive views.",
    ),
    Statistic(
        "wrong_gradients",
        2,
        "larger share of noisy images, and of those an attack ended at, whose directional derivatives miss finite "
        "differences by more than 20 % (RMS over 8 directions, at the best of the step sizes)",
        0.05,
        0.15,
        "Look for detach, no_grad, in-place edits and custom backward passes; a surrogate gradient belongs in an "
        "adaptive view.",
    ),
    Statistic(
        "precision_dependence",
        3,
        "share of images whose gradient changes by more than 1 % when the loss is multiplied by 2^8 or 2^16, or has "
        "another sign than in float64 on more than 10 % of its L1 mass",
        0.05,
        0.25,
        "Attack in float32 with summed losses; remove half precision, gradient clipping and scaled hooks from the "
        "forward pass.",
    ),
    Statistic(
        "repeat_difference",
        4,
        "largest change of logits (per spread of an image's logits) or of gradients (relative) when the same question "
        "is asked again, with and without gradients; under declared randomness with the same ids and seed",
        1e-4,
        1e-3,
        "Declare randomized=True and key the draws by ids and seed, or make the forward pass deterministic (eval "
        "mode, no noise).",
    ),
    Statistic(
        "eot_agreement",
        4,
        "cosine between the gradients averaged over two disjoint sets of 8 draws, mean over images; declared "
        "randomness only",
        0.3,
        0.05,
        "Average more EOT draws a step until the gradient converges.",
        low_is_bad=True,
    ),
    Statistic(
        "coupling",
        5,
        "largest change of an image's logits (per spread) with other neighbours, another order, alone, after other "
        "images and after its own near copies; in half precision per 4 units of rounding over 1e-4",
        1e-4,
        1e-3,
        "Make each image's logits a function of that image alone: no batch statistics, no caches, no updates at test "
        "time.",
    ),
    Statistic(
        "undeclared_optimisation",
        6,
        "tensors read back by a backward pass inside forward, where optimizes_in_forward is not declared",
        0,
        0,
        "Declare optimizes_in_forward=True and ship adaptive views.",
    ),
    Statistic(
        "defence_effect",
        7,
        "largest mean change of logits (per spread) that the defence makes on clean, noisy and attacked images; for "
        "an undeclared wrapper only where it computes more than its part",
        1e-2,
        1e-3,
        "Report the undefended model: the defence changes nothing that is measured.",
        low_is_bad=True,
    ),
    Statistic(
        "transfer_ahead",
        8,
        _P.format("images made on the undefended model get further than the white-box attack's"),
        0.05,
        0.01,
        "Trust the transfer number at most, and find the gradient masking that stops the white-box attack.",
        low_is_bad=True,
    ),
    Statistic(
        "black_box_ahead",
        9,
        _P.format("Square gets further than the white-box attack"),
        0.05,
        0.01,
        "Gradients mislead here: attack through a smooth surrogate and report the worst case.",
        low_is_bad=True,
    ),
    Statistic(
        "standing_at_full_eps",
        10,
        "share of images that no eps breaks, up to one that allows any image",
        0.02,
        0.1,
        "An unbounded attack must succeed: find what stops it before believing the bounded one.",
    ),
    Statistic(
        "not_monotone",
        10,
        _P.format("more images stand at a larger eps") + _LEAST.format("neighbouring ones"),
        0.05,
        0.01,
        "Larger budgets must break more: use more steps, and look for masked gradients.",
        low_is_bad=True,
    ),
    Statistic(
        "more_steps_break",
        11,
        _P.format("five times the steps from another start break more"),
        0.05,
        0.01,
        "Raise steps and restarts until the number stays.",
        low_is_bad=True,
    ),
    Statistic(
        "last_iterate_lost",
        12,
        _P.format("some iterate breaks more than the last one"),
        0.05,
        0.01,
        "Keep the best iterate, and lower the step size.",
        low_is_bad=True,
    ),
    Statistic(
        "robust_above_clean",
        13,
        _P.format("more images are right under an attack than without one") + _LEAST.format("attacks"),
        0.05,
        0.01,
        "Look for labels leaking into the prediction, and for a detector of the attack.",
        low_is_bad=True,
    ),
    Statistic(
        "noise_ahead",
        14,
        _P.format("the best of 10 random perturbations (4 with views) gets further than the white-box attack"),
        0.05,
        0.01,
        "Noise must not beat an attack: the attack does not work here.",
        low_is_bad=True,
    ),
    Statistic(
        "gain_over_noise",
        14,
        "accuracy on transferred images less that of plain noise of the defence's size",
        0.05,
        None,
        "Report plain noise of the same size beside the defence: it does as well.",
        low_is_bad=True,
    ),
    Statistic(
        "views",
        15,
        "adaptive views of a defence",
        1,
        None,
        "Write adaptive(model): until then every robust number is transfer only.",
        low_is_bad=True,
    ),
    Statistic(
        "views_ahead",
        15,
        _P.format("the views break more than the judge's own gradients")
        + "; only where those are declared exact: no randomness, no optimisation, no straight-through gradient",
        0.05,
        0.01,
        "The judge's own gradients hide what the view named here shows: judge by the views alone, and do not call the "
        "difference robustness.",
        low_is_bad=True,
    ),
    Statistic(
        "planted_missed",
        16,
        "share of planted adversarial examples (a linear readout of the logits that a random point of the ball "
        "crosses) which the attack misses",
        0.05,
        0.2,
        "The attack fails where success is certain: strengthen it or unmask the gradients.",
    ),
    Statistic(
        "misleading_slices",
        17,
        "share of images where the best of 8 random directions raises the margin as much as the gradient's, at eps/8 "
        "to eps",
        0.1,
        0.3,
        "The loss surface is rough or flat at the scale of eps: attack a smoothed model.",
    ),
    Statistic(
        "lost_in_8_bits",
        18,
        "share of the broken images that are right again once stored in 8 bits",
        0.25,
        0.5,
        "Project the attack on the 8-bit grid, or state that it needs finer images than files hold.",
    ),
    Statistic(
        "eps_in_levels",
        18,
        "eps in 255ths",
        1,
        0.5,
        "State eps in [0, 1] pixels, and see whether it was divided by 255 twice: no 8-bit image holds less than half "
        "a level.",
        low_is_bad=True,
    ),
    Statistic(
        "eps_share",
        19,
        "eps as a share of the one that allows any image (1 for linf, the root of the dimension for L2)",
        0.25,
        0.5,
        "Half the pixel range makes every image grey: state eps in [0, 1] pixels, such as 8/255.",
    ),
    Statistic(
        "other_range_better",
        19,
        _P.format("clean accuracy is higher with images in another range or channel order")
        + _LEAST.format("conventions"),
        0.05,
        0.01,
        "Put scaling and normalisation inside the model, which gets RGB in [0, 1].",
        low_is_bad=True,
    ),
    Statistic(
        "at_chance",
        19,
        "binomial p of the clean accuracy under guessing",
        0.05,
        None,
        "The model guesses: check weights, class order, labels and preprocessing.",
    ),
    Statistic(
        "half_width",
        20,
        "half the width of the widest 95 % Wilson interval",
        0.15,
        0.3,
        "Use more images.",
    ),
)

BY_KEY = {statistic.key: statistic for statistic in STATISTICS}
