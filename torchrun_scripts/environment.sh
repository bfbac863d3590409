# What torchrun_scripts/*.sh with several ranks on a machine have in common; they read it, nobody runs it.
# One thread a rank unless you say otherwise: torchrun would choose that too, and warn at length.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
command -v torchrun >/dev/null || {
    echo "error: no torchrun on PATH; run make demo, or activate the environment that thinwire is installed in" >&2
    exit 1
}
