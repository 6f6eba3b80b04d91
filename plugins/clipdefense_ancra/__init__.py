"""ANCRA and reverse attention as a plugin of clipdefense."""

import pluggy

hookimpl = pluggy.HookimplMarker("clipdefense")


@hookimpl
def register_defenses(register):  # type: ignore[no-untyped-def]
    register(
        "ancra",
        "clipdefense_ancra.ancra:ANCRA",
        summary="asymmetric negative contrast on a TeCoA, TRADES or MART base (2310.03358)",
    )
    register(
        "reverse-attention",
        "clipdefense_ancra.reverse_attention:ReverseAttention",
        summary="features times the predicted class's weights (2310.03358)",
        known_unsound=(
            "it hides the gradient instead of moving the decision: the mask that multiplies the features is chosen by "
            "an argmax without a gradient and turns the sign of many features, so an attack on the final logits is "
            "led astray; attack the logits that choose the mask and the robust accuracy falls"
        ),
    )


@hookimpl
def register_models(register):  # type: ignore[no-untyped-def]
    register(
        "ancra",
        "clipdefense_ancra.resnet:load",
        summary="the networks with reverse attention of 2310.03358: resnet18, preact-resnet18, wide-resnet28 or -34",
    )
