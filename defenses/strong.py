"""What the built-in parts can do together, which is no promise: docs/state_of_the_art.md has what is left."""

from __future__ import annotations

from deepenc.encryption.cost.budget import Budget
from deepenc.encryption.defense import Defense
from defenses.hardening.drift import Drift
from defenses.hardening.optimise import Optimise
from defenses.hardening.permute import Permute
from defenses.hardening.withhold import Withhold
from defenses.placement.max_entropy import MaxEntropy
from defenses.weights.conditional import Conditional

strong = Defense(
    name="strong",
    summary="Optimised in disguise (5 % of memory), the victim permuted, its statistics kept with the key.",
    placement=MaxEntropy(budget=Budget(share=0.05)),
    weights=Conditional(),
    hardening=(
        Permute(),
        Optimise(disguise=True, stealth=10.0, removal=0.5, steps=150, batch_size=32),
        Drift(),
        Withhold(),
    ),
)
