"""The lab: what the stages decide and what a learned concept is worth, measured. Not installed; `ldm` never imports it.

* world: a rendered world of captioned images whose attributes are known; networks: the small networks trained on it.
* images: batches of images for experiments; judges: what an image shows, or which of two references it is closer to.
* captions: does a model draw what its captions say? (scripts/accuracy.py)
* spectrum: what is decided in which stage? (scripts/spectrum.py)
* concepts, ablation: does a concept transfer the wanted attribute and no other? (scripts/ablate.py)
* metrics: scores of generated images against references and prompts. (scripts/evaluate.py)
* jobs: measurements in parallel, each kept on disk; statistics: confidence intervals; plots: figures.
* benchmark: time, memory and arithmetic of every optimisation (scripts/benchmark.py).
"""
