#!/bin/sh
# Train on a rented GPU machine over ssh:
#     ./remote.sh deploy HOST DIR [train.py options]    copy the scripts and DIR, set up, start a detached run
#     ./remote.sh monitor HOST [-f]                     verdict, GPU, epoch, metrics, last lines; -f follows to the end
#     ./remote.sh download HOST [DEST]                  model, statistics, metrics and logs, verified by checksum
# HOST is whatever `ssh HOST` understands: ports, keys and jump hosts belong in ssh's own configuration. A DIR that is
# not here is a folder on HOST. All is in ~/speech-emotion-trainer there, and nothing of it is ever deleted.
# Exit status: 0 done, or the run has finished; 1 failed; 2 wrong use; 3 running (a second deploy changes nothing);
# 4 stalled; 5 unhealthy (NaN or Inf); 6 killed; 7 not deployed; 255 unreachable.

set -u
LC_ALL=C COPYFILE_DISABLE=1 # the second keeps macOS's tar from adding files of its own
export LC_ALL COPYFILE_DISABLE
base=speech-emotion-trainer
sha256=sha256sum
command -v sha256sum >/dev/null || sha256='shasum -a 256'

shown() { # standard input without what steers a terminal: control characters, UTF-8's too, changes of direction
    tr '\000-\010\013-\037\177' '?' |
        sed "$(printf 's/\302[\200-\237]/?/g;s/\342\200[\252-\256]/?/g;s/\342\201[\246-\251]/?/g')"
}

die() { # STATUS TEXT
    printf 'remote.sh: %s\n' "$2" | shown >&2
    exit "$1"
}

connect() { # one private connection for all calls; rsync goes through the same file, and so never parses HOST
    case $host in
        '' | [-.]* | *@-* | *[!A-Za-z0-9@._:%+-]*) die 2 "not a host: '$host'" ;;
    esac
    tmp=$(mktemp -d /tmp/remote.XXXXXX) || exit 1 # a short path: that of a socket may have some 100 characters
    trap '[ ! -S "$tmp/socket" ] || ssh -o ControlPath="$tmp/socket" -O exit -- "$host" 2>/dev/null; rm -rf "$tmp"' EXIT
    trap 'exit 129' HUP && trap 'exit 130' INT && trap 'exit 143' TERM
    cat >"$tmp/ssh" <<END
shift # the name that rsync gives the host
exec ssh -aTx -o BatchMode=yes -o StrictHostKeyChecking=accept-new -o ClearAllForwardings=yes -o RemoteCommand=none \\
    -o ConnectTimeout=15 -o ServerAliveInterval=15 -o ControlMaster=auto -o ControlPersist=30 \\
    -o ControlPath=$tmp/socket -- '$host' "\$@"
END
    sed -n '/^# --- the far side/,/^# --- the call/p' "$0" >"$tmp/functions"
}

# far FUNCTION ARGUMENT...: call one of the functions below on the far side. They, the arguments in quotes, and then
# this function's own standard input go over one pipe: no name is ever part of a command line there.
far() {
    {
        cat "$tmp/functions"
        [ "$1" != verify ] || echo "mkdir -p -m 700 $base"
        echo "cd $base 2>/dev/null || { echo 'not deployed' && exit 7; }"
        for word; do # the x keeps a newline at the end
            case $word in *\'*) word=$(printf %sx "$word" | sed "s/'/'\\\\''/g") && word=${word%x} ;; esac
            printf "'%s' " "$word"
        done
    } >"$tmp/program"
    { wc -c <"$tmp/program" && cat "$tmp/program" -; } 2>/dev/null |
        sh "$tmp/ssh" far "exec sh -c 'read -r n; eval \"\$(dd bs=\$n count=1 iflag=fullblock 2>/dev/null)\"'"
}

# upload NAME FOLDER ITEM...: copy these items of FOLDER, and set `there` to their folder on the far side. It is named
# after a checksum of the content: versions never mix, a second deploy finds what has arrived, a run keeps its own.
upload() {
    name=$(printf %s "$1" | tr -c 'A-Za-z0-9._-' _ | sed 's/^[.-]/_/' | cut -c 1-100) folder=$2
    shift 2
    # shellcheck disable=SC2086 # a command and its options
    (cd -- "$folder" && find -L "$@" -type f -exec $sha256 {} +) >"$tmp/found" ||
        echo "remote.sh: what cannot be read is left out" >&2
    [ -s "$tmp/found" ] || die 2 "there is no file to read in $folder"
    sort "$tmp/found" >"$tmp/manifest"
    there=data/$name-$($sha256 <"$tmp/manifest" | cut -c 1-12)
    for way in none -rLt -rLtc tar; do
        case $way in
            -*)
                command -v rsync >/dev/null || continue
                (cd -- "$folder" && rsync "$way" -e "sh $tmp/ssh" "$@" "far:$base/$there/") ;;
            tar) (cd -- "$folder" && tar -c -h -f - "$@") | far unpack "$there" ;;
        esac
        far verify "$there" <"$tmp/manifest" >"$tmp/wrong" && return
        status=$?
        [ "$status" -eq 8 ] || exit "$status"
    done
    die 1 "these did not arrive whole: $(head -n 20 "$tmp/wrong")"
}

deploy() { # ARGUMENT... of train.py
    here=$(dirname -- "$0")
    upload scripts "$here" ./emotions.py ./stats.py ./check_data.py ./train.py ./remote.sh ./requirements.txt
    scripts=$there previous='' directory='' out='' prefix=''
    for argument; do
        shift
        there=$argument
        case $argument in
            --out=*) out=${argument#*=} ;;
            -*) ;;
            *) case $previous in
                --out) out=$argument ;;
                --labels) send "$argument" ;;
                --predict) send "$argument" && prefix=predict- ;;
                '' | [!-]* | --*=* | --transpose | --nan-to-zero | \
                    --fresh | --no-compile-cache | --recompute-stats)
                    send "$argument" && directory=$there ;;
            esac ;;
        esac
        set -- "$@" "$there"
        previous=$argument
    done
    [ -n "$directory" ] || die 2 "deploy needs DIR, the folder of the features"
    far start "$scripts" "$directory" "${out:-runs/$prefix$(basename -- "$directory")}" "$@" </dev/null
}

send() { # PATH of a folder or file that train.py reads; if it is here, copy it and set `there`
    case $1 in /*) path=$1 ;; *) path=./$1 ;; esac
    if [ -d "$path" ]; then
        full=$(cd -- "$path" && pwd -P) || exit 1
        upload "${full##*/}" "$path" .
    elif [ -f "$path" ]; then
        upload file "$(dirname -- "$path")" "./${path##*/}"
        there=$there/${path##*/}
    fi
}

monitor() { # [-f]: then again and again until the run has ended, each time only the lines that are new
    echo "$tmp" >"$tmp/seen" # what no report says: not every grep takes an empty list
    while :; do
        far report </dev/null >"$tmp/said"
        status=$?
        [ "$status" -ne 255 ] || echo unreachable >"$tmp/said"
        grep -v -x -F -f "$tmp/seen" "$tmp/said" | shown
        case ${1-}:$status in -f:[345]) sleep 2 && cp "$tmp/said" "$tmp/seen" ;; *) exit "$status" ;; esac
    done
}

download() { # [DEST]
    line='^[0-9a-f]\{64\}  [A-Za-z0-9_][A-Za-z0-9._-]*$' # whoever answers there can name no other place here
    for way in -rLt -rLtc tar; do
        far manifest </dev/null >"$tmp/said" || exit
        grep "$line" "$tmp/said" >"$tmp/manifest" || die 1 "the run has left nothing yet"
        dest=${1:-runs/$host/$(sed -n 's/^run \([A-Za-z0-9_][A-Za-z0-9._-]*\)$/\1/p' "$tmp/said")}
        case $dest in /*) ;; *) dest=./$dest ;; esac
        dest=${dest%/} part=${dest%/}.part
        [ -e "$dest/manifest.sha256" ] || [ -z "$(ls -A -- "$dest" 2>/dev/null)" ] ||
            die 2 "$dest holds other things: name another folder"
        mkdir -p -- "$part" || exit 1
        if [ "$way" = tar ]; then
            rm -f -- "$part/manifest.sha256"
            far pack </dev/null | (cd -- "$part" && tar -x -o -f -)
            grep "$line" "$part/manifest.sha256" >"$tmp/manifest" || die 1 "the answer was cut off"
        else
            command -v rsync >/dev/null || continue
            cut -c 67- "$tmp/manifest" >"$tmp/names"
            rsync "$way" -e "sh $tmp/ssh" --files-from="$tmp/names" "far:$base/current/" "$part/"
        fi
        while read -r sum name; do
            case $($sha256 <"$part/$name") in "$sum "*) ;; *) echo "$name" ;; esac
        done <"$tmp/manifest" >"$tmp/wrong" 2>/dev/null
        [ -s "$tmp/wrong" ] || break
    done
    [ ! -s "$tmp/wrong" ] || die 1 "these did not arrive whole: $(cat "$tmp/wrong")"
    mkdir -p -- "$dest" && cp "$tmp/manifest" "$dest/manifest.sha256" || exit 1
    while read -r sum name; do mv -f -- "$part/$name" "$dest/" || exit 1; done <"$tmp/manifest"
    rm -f -- "$part/manifest.sha256"
    rmdir -- "$part" 2>/dev/null # a transfer that was cut may have left more in it
    printf '%s\n' "verified in $dest:" "$(cut -c 67- "$tmp/manifest")" | shown
}

# --- the far side: functions that run there, in the folder that deploy makes ------------------------------------------

umask 077

locked() { # by the launcher and the programs it starts: it falls with the last of them, however that ends
    [ -e lock ] && ! flock -s -n lock true
}

busy() {
    echo "a run is going on there: nothing was changed" >&2
    exit 3
}

verify() { # FOLDER; the manifest is standard input. The first thing that is asked there, so what is needed is seen here
    for tool in python3 flock setsid sha256sum tar awk; do
        command -v "$tool" >/dev/null || { echo "$tool is needed on the far side" >&2 && exit 1; }
    done
    ! locked || busy
    mkdir -p "$1" && cd "$1" && wrong=$(sha256sum -c 2>&1) && return
    printf '%s\n' "$wrong" | grep -v ': OK$'
    exit 8
}

unpack() { # FOLDER; the archive is standard input
    mkdir -p "$1" && cd "$1" && tar -x -o -f -
}

start() { # SCRIPTS DIR OUT ARGUMENT... of train.py
    [ -d "$2" ] || { echo "DIR is a folder neither here nor there" >&2 && exit 2; }
    exec 9>>lock
    flock -n 9 || { sleep 1 && flock -n 9; } || busy # a monitor that looks holds it for an instant
    mkdir -p -- "$3" && ln -sfn -- "$3" current || exit 1
    [ ! -e status ] || mv status status.last
    echo set-up >step && date >started
    scripts=$1 out=$3
    shift 3
    setsid nohup sh "$scripts/remote.sh" launch "$scripts" "$@" --out "$out" </dev/null >>current/remote.log 2>&1 &
    echo started # with a session of its own and no stream of the connection, it outlives that
}

launch() { # SCRIPTS ARGUMENT... of train.py; the lock is on descriptor 9
    scripts=$1
    shift
    echo "== $(date): train.py $*" && echo $$ >pid
    {
        cmp -s "$scripts/requirements.txt" venv/requirements.txt || { # copied there last: these are installed
            python3 -m venv venv && venv/bin/python -m pip install -r "$scripts/requirements.txt" &&
                cp "$scripts/requirements.txt" venv/
        }
    } && {
        echo training >step
        venv/bin/python -u "$scripts/train.py" "$@" &
        echo $! >pid
        wait $!
    }
    echo $? >status.new && mv status.new status
}

fresh() { # FILE of the run, if it is of this start and not of an earlier one
    find "current/$1" -newer started 2>/dev/null | grep -q .
}

broken() { # whether the last row of a fold and seed has a NaN or Inf; places from the end: a setting may hold commas
    fresh history.csv && awk -F , '
        NR == 1 { for (i = 1; i <= NF; i++) at[$i] = i - NF; next }
        {
            member = $(NF + at["fold"]) "," $(NF + at["seed"])
            for (i = 1; i < NF + at["epoch"]; i++) member = member "," $i
            numbers = $(NF + at["loss"]) $(NF + at["gradient_norm"]) $(NF + at["validation_loss"])
            bad[member] = numbers !~ /^[-+.0-9e]*$/
        }
        END { for (member in bad) worst += bad[member]; exit !worst }' current/history.csv
}

judge() { # set verdict and status
    verdict=running status=3 code='' alive=yes
    locked || alive='' # asked before the status is looked for: that is written first
    [ ! -e status ] || read -r code <status
    if [ ! -e started ]; then
        verdict='not deployed' status=7
    elif [ "$code" = 0 ]; then
        verdict=finished status=0
    elif [ "${code:-999}" -lt 128 ]; then
        verdict="failed $code" status=1
    elif [ -n "$code" ] || [ -z "$alive" ]; then
        verdict='killed: deploy again to resume' status=6
    elif broken; then
        verdict='unhealthy: NaN or Inf' status=5
    elif [ -z "$(find current/remote.log current/train.log current/history.csv -mmin -15 2>/dev/null)" ]; then
        verdict='stalled: nothing written in 15 minutes' status=4
    fi
}

gpu() { # nvidia-smi may be missing, fail, or hang so that no signal ends it
    command -v nvidia-smi >/dev/null || { echo "no nvidia-smi" && return; }
    answer=$(mktemp) tries=0
    {
        timeout 5 nvidia-smi --query-gpu=name,utilization.gpu,memory.used,memory.total --format=csv,noheader
        echo "status $?"
    } </dev/null >"$answer" 2>&1 &
    until grep -q '^status ' "$answer" || [ "$tries" -eq 60 ]; do sleep 0.1 && tries=$((tries + 1)); done
    [ "$tries" -lt 60 ] || echo "status 124" >>"$answer"
    sed '/^status 0$/d;s/^status 124$/nvidia-smi hangs/;s/^status /nvidia-smi failed: /' "$answer"
    rm -f "$answer"
}

report() {
    judge
    echo "$verdict"
    [ "$status" -ne 7 ] || exit 7
    echo "$(cat step) since $(cat started), pid $(cat pid 2>/dev/null)"
    gpu | sed 's/^/GPU: /'
    ! fresh train.log || grep '^epoch ' current/train.log | tail -n 1
    ! fresh metrics.json ||
        sed -n 's/^  "\(ua\|wa\|macro_f1\|chance_ua\)": \([0-9]*\.[0-9]\{1,4\}\).*/\1 \2/p' current/metrics.json
    tail -n 10 current/remote.log | cut -c 1-300
    exit "$status"
}

names() { # what a run leaves, but for its checkpoints
    cd current && for name in *.npz *.npy *.json *.csv *.log; do
        case $name in checkpoint* | [!A-Za-z0-9_]* | *[!A-Za-z0-9._-]*) ;; *) [ ! -f "$name" ] || echo "$name" ;; esac
    done
}

manifest() {
    echo "run $(basename -- "$(readlink current)")"
    for name in $(names); do sha256sum "current/$name"; done | sed 's,  current/,  ,'
}

pack() { # the same as one archive, from a copy, because a run goes on writing; it ends in the manifest of the copy
    snapshot=$(mktemp -d) || exit 1
    trap 'rm -rf "$snapshot"' EXIT
    for name in $(names); do cp -p "current/$name" "$snapshot/"; done
    cd "$snapshot" && sums=$(sha256sum -- *) && echo "$sums" >manifest.sha256 && tar -c -f - -- *
}

# --- the call -------------------------------------------------------------------------------------------------------

case $#:${1-}:${3-} in
    [3-9]:launch:* | [1-9][0-9]*:launch:*) shift && launch "$@" ;; # by start, on the far side
    [3-9]:deploy:* | [1-9][0-9]*:deploy:* | 2:monitor: | 3:monitor:-f | [23]:download:*)
        command=$1 host=$2
        shift 2
        connect && "$command" "$@" ;;
    *) sed -n '2,/^$/s/^# \{0,1\}//p' "$0" >&2 && exit 2 ;;
esac
