"""`python -m regrad_qdrant` is the command; `accelerate launch -m regrad_qdrant train …` trains on many GPUs."""

from regrad_qdrant.cli.app import main

if __name__ == "__main__":
    main()
