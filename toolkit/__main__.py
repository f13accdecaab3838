"""The command for launchers that start a module: `accelerate launch -m toolkit train RECIPE`."""

from toolkit.cli import main

if __name__ == "__main__":
    main()
