"""Loss terms, one file each."""

NAMES = {
    "halting": "halting@Halting",
    "kl": "kl_to_base@KLToBase",
    "label_smoothing": "label_smoothing@LabelSmoothing",
    "reasoning": "reasoning@Reasoning",
    "z_loss": "z_loss@ZLoss",
}
