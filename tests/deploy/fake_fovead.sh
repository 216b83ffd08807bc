#!/usr/bin/env bash
# fake_fovead.sh - stands in for fovead in tests of the launcher: mpirun starts programs that are not MPI too.
# FAKE_DIR: where it leaves notes. FAKE: what to do.
rank=${OMPI_COMM_WORLD_RANK:-0}
printf '%s\n' "$@" >"$FAKE_DIR/args.$rank"
echo $$ >"$FAKE_DIR/pid.$rank"
env >"$FAKE_DIR/env.$rank"
case ${FAKE:-exit0} in
exit*)
    [[ $rank -eq 0 ]] && exit "${FAKE#exit}"
    exit 0
    ;;
serve) trap 'echo drained >"$FAKE_DIR/drained.$rank"; exit 0' USR1 ;;
deaf) trap '' USR1 TERM ;;
esac
touch "$FAKE_DIR/ready.$rank"
while :; do
    sleep 0.05 &
    wait $!
done
