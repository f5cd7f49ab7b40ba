"""`python -m unigrpo_cli`, which launchers of several processes start."""

from unigrpo_cli.cli import main

if __name__ == "__main__":
    main()
