"""Do the papers' claims hold here? Experiments on real speech, their figures, and the page that is made of them (docs/results.md).

    python -m recipes.evidence run              # everything that is not there yet; goes on where it stopped; hours
    python -m recipes.evidence smoke --out /tmp/x   # all of it on a handful of clips: minutes; its figures mean nothing
    python -m recipes.evidence collect          # what is there -> benchmarks/results
    python -m recipes.evidence page             # the committed figures -> docs/results.md

ground         a base, clips, and what its encoder says to them
methods        what is trained: full fine-tuning, BitFit, LoRA, AdaLoRA, VeRA, S2-LoRA
fitting        one loop for all of them
measuring      errors of each clip
store          one file per run
child_speech, languages, beyond     which runs there are
full_size      the same runs on a real base and real data sets, by recipe; and what they will cost (docs/full_size.md)
collect        one committed file per part
comparing      systems, and differences on the same clips
child_report, languages_report, beyond_report     their tables and figures; what these share is in tables and figures
claims, page   the papers' claims with verdicts; docs/results.md
smoke_data     sets for `smoke`, of recordings that ship
"""
