"""One of everything, as a stranger would write it: hooks here, implementations in `parts`."""

import pluggy

hookimpl = pluggy.HookimplMarker("clipdefense")


@hookimpl
def register_models(register):
    register("good-cells", "thirdparty_good.parts:load_cells", summary="average colours of 4 x 4 cells [as embedding]")


@hookimpl
def register_defenses(register):
    register("good-smooth", "thirdparty_good.parts:Smooth", summary="a 3 x 3 mean filter")


@hookimpl
def register_attacks(register):
    register("good-corner", "thirdparty_good.parts:corner", summary="one signed gradient step to the corner of the box")
    register("good:", "thirdparty_good.parts:family", summary="good:steps-N is N such steps")


@hookimpl
def register_datasets(register):
    register("good-ramps", "thirdparty_good.parts:load_ramps", summary="coloured ramps")


@hookimpl
def register_commands(register):
    register("good-hello", "thirdparty_good.command:hello", summary="says hello")
