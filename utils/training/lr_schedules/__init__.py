"""Learning-rate schedules: pure functions, chosen by the key `lr_schedule`.

`NAMES` has short names; any other function in this package is named `module@function`. It is called
as `function(progress, step, options)` and returns a factor on the peak learning rate. The linear
warm-up is a second factor.

- `progress`: share of the run completed, 0..1; with `feed=present`, share of the run after the
  warm-up.
- `step`: the optimizer step, from 1.
- `options`: `ScheduleOptions` of utils/config/schema.py, with `lr_min_ratio`. To declare options of
  your own, annotate this parameter with a subclass of it.
"""

NAMES = {
    "constant": "shapes@constant",
    "cosine": "shapes@cosine",
    "wsd": "shapes@wsd",
}
