"""Test-time baselines as a plugin of clipdefense: random noise, anti-adversary, hedge defence, TTE."""

import pluggy

hookimpl = pluggy.HookimplMarker("clipdefense")


@hookimpl
def register_defenses(register):  # type: ignore[no-untyped-def]
    register(
        "random-noise",
        "clipdefense_testtime.noise:RandomNoise",
        summary="uniform noise on the input, the baseline of test-time counterattacks",
    )
    register(
        "anti-adversary",
        "clipdefense_testtime.anti_adversary:AntiAdversary",
        summary="steps that raise the confidence in the predicted class (Alfarra et al. 2022)",
    )
    register(
        "hedge",
        "clipdefense_testtime.hedge:HedgeDefense",
        summary="steps that raise the loss of all classes at once (Wu et al. 2021)",
    )
    register(
        "tte",
        "clipdefense_testtime.tte:TTE",
        summary="test-time ensembling: mean logits over flips and crops (Perez et al. 2021)",
    )
