"""Layout of TensorBoard's Custom Scalars tab: what to watch first, in groups of charts."""

from __future__ import annotations

import re
from collections.abc import Collection

Layout = dict[str, dict[str, tuple[str, list[str]]]]
"""Group -> chart -> kind of chart and regular expressions of its scalars, for `torch.utils.tensorboard.summary`."""

GROUPS = {
    "players": {
        "losses": r"loss/(discriminator|generator)$",
        "discriminator outputs": r"discriminator/(real|fake)_logit$",
        "discriminator probabilities": r"discriminator/(real|fake)_probability$",
        "divergence estimate": r"divergence/",
        "gradient norms": r"gradient_norm/",
        "diversity": r"(generator|data)/diversity$",
        "learning rates": r"learning_rate/",
        "augmentation": r"augmentation/",
        "schedules": r"schedule/",
    },
    "penalties": {
        "gradient penalties": r"loss/(r1|r2|gradient_penalty)$",
        "drift": r"loss/drift$",
        "feature matching": r"loss/feature_matching$",
        "historical averaging": r"loss/(discriminator|generator)_history$",
    },
    "metrics": {
        "FID": r"fid(50k_full)?\[",
        "FID-infinity": r"fid_infinity\[",
        "MiFID": r"mifid\[",
        "inception score": r"(inception_score|is50k)\[",
        "KID": r"kid(50k_full)?\[",
        "precision and recall": r"(precision_recall|pr50k3_full)_",
        "density and coverage": r"density_coverage_",
        "sliced Wasserstein distance": r"sliced_wasserstein$",
        "path length": r"(ppl|ppl2_wend)\[",
        "classes": r"(classes|stacked_mnist)\[",
        "modes": r"modes$",
        "n-gram divergence": r"ngram_js\[",
    },
    "speed": {
        "images per second": r"speed/images_per_second$",
        "seconds per step": r"(speed/(step|data_wait)|ranks/own_step)_seconds",
        "memory": r"memory/",
    },
    "health": {
        "skipped updates": r"skipped_updates/",
        "rollbacks": r"progress/rollbacks$",
        "replaced samples": r"data/replaced_samples$",
        "failed writes": r"(checkpoint|tracker)/failures$",
        "EMA decay": r"ema/decay$",
        "growth": r"growth/(level|fade)$",
    },
}
"""Group -> chart -> regular expression that the names of its scalars begin with.

TensorBoard merges the layouts of several runs, and shows a chart twice if two runs define it differently. Therefore a
run may leave charts out, but never changes one.
"""


def custom_layout(names: Collection[str]) -> Layout:
    """Return the layout of the charts that show at least one of these scalars."""
    found: Layout = {}
    for group, charts in GROUPS.items():
        for chart, pattern in charts.items():
            if any(re.match(pattern, name) for name in names):
                found.setdefault(group, {})[chart] = ("Multiline", [pattern])
    return found
