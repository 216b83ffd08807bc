#!/usr/bin/env bash
# fake_fovead.sh - stands in for fovead in tests of the launcher: mpirun starts programs that are not MPI too.
# FAKE_DIR: where it leaves notes. FAKE: what to do.
rank=${OMPI_COMM_WORLD_RANK:-0}
printf '%s\n' "$@" >"$FAKE_DIR/args.$rank"
echo $$ >"$FAKE_DIR/pid.$rank"
env >"$FAKE_DIR/env.$rank"
case ${FAKE:-exit0} in
exit*)
    # (fovead says so under its other codes)
    [[ $rank -eq 0 && -n ${FOVEA_EXIT_FILE:-} && ${FAKE#exit} -lt 10 ]] && echo "${FAKE#exit}" >"$FOVEA_EXIT_FILE"
    [[ $rank -eq 0 ]] && exit "${FAKE#exit}"
    exit 0
    ;;
lose*) # rank 0 loses another rank, that many times; says so as fovead does; then serves
    if [[ $rank -eq 0 ]]; then
        echo run >>"$FAKE_DIR/runs"
        if [[ $(wc -l <"$FAKE_DIR/runs") -le ${FAKE#lose} ]]; then
            echo 3 >"$FOVEA_EXIT_FILE"
            exit 3
        fi
    fi
    trap 'echo drained >"$FAKE_DIR/drained.$rank"; echo 0 >"$FOVEA_EXIT_FILE"; exit 0' USR1
    ;;
serve) trap 'echo drained >"$FAKE_DIR/drained.$rank"; exit 0' USR1 ;;
deaf) trap '' USR1 TERM ;;
quit) # rank 0 comes and goes at once; the others hear nothing
    [[ $rank -eq 0 ]] && echo 0 >"$FOVEA_EXIT_FILE" && exit 0
    trap '' USR1 TERM
    ;;
esac
touch "$FAKE_DIR/ready.$rank"
while :; do
    sleep 0.05 &
    wait $!
done
