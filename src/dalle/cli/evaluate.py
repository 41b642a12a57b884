"""Figures of trained stages: `dalle evaluate name=demo sampler=ddim`; of several: `-m guidance=1,2,4`.

Hydra only puts the configuration together; what happens then is dalle.evaluation.
"""

from dalle.cli.compose import compose


def main(arguments: list[str]) -> None:
    jobs = compose("evaluate", arguments)
    if not jobs:
        return
    from dalle.evaluation import multirun  # torch: only once the configuration is right
    from dalle.machine import settle_threads

    settle_threads()
    if jobs[0].multirun:
        multirun.sweep([job.config for job in jobs], [job.words for job in jobs])
    elif jobs[0].config["compare"]:
        multirun.compare(jobs[0].config, jobs[0].words)
    else:
        multirun.one(jobs[0].config)
