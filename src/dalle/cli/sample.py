"""Pictures from trained stages: `dalle sample prompt="a small red circle" sampler=ddim steps=25`."""

from dalle.cli.compose import compose


def main(arguments: list[str]) -> None:
    for job in compose("sample", arguments):
        from dalle.machine import settle_threads  # torch: only once the configuration is right
        from dalle.pipelines.sampling import sample

        settle_threads()
        sample(job.config)
