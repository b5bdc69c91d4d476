"""Learning-rate schedules: pure functions that the key `lr_schedule` names.

An entry of `NAMES` is a short name; any function below this package is named `module@function`.
It is called as `function(progress, step, options)` and returns the factor on the peak learning
rate, which the linear warm-up multiplies.

- `progress`: share of the run that is done, 0..1; with `feed=present`, of what follows the warm-up.
- `step`: the optimizer step, from 1.
- `options`: `ScheduleOptions` of utils/config/schema.py, with `lr_min_ratio`; or the subclass of it
  that annotates this parameter and declares the options of this schedule.
"""

NAMES = {
    "constant": "shapes@constant",
    "cosine": "shapes@cosine",
    "wsd": "shapes@wsd",
}
