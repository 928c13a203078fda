#!/bin/sh
# Train on a rented GPU machine over ssh:
#     ./remote.sh deploy HOST DIR [train.py options]    copy the scripts and DIR, set up, start a detached run
#     ./remote.sh monitor HOST [-f]                     verdict, GPU, epoch, metrics, last lines; -f follows to the end
#     ./remote.sh download HOST [DEST]                  model, statistics, metrics and logs, verified by checksum
#     ./remote.sh stop HOST                             end the run; the same deploy resumes it
#     ./remote.sh remove HOST                           list what is there, ask, and remove it
# HOST is whatever `ssh HOST` understands: ports, keys and jump hosts belong in ssh's own configuration. A DIR that is
# not here is a folder on HOST. All is in ~/speech-emotion-trainer there. PYTHON=NAME before the command chooses the
# Python (3.11 or newer) on HOST; otherwise it is looked for.
# Exit status: 0 done, or the run has finished; 1 failed; 2 wrong use; 3 running (a second deploy changes nothing);
# 4 stalled; 5 unhealthy (NaN or Inf); 6 killed; 7 not deployed; 255 unreachable.

set -u
LC_ALL=C COPYFILE_DISABLE=1 # the second keeps macOS's tar from adding files of its own
export LC_ALL COPYFILE_DISABLE
base=speech-emotion-trainer
marker="--- $base ---" # the first line of each answer: before it comes what the login shell there prints
config="write 'Host gpu' with HostName, Port, User and IdentityFile into ~/.ssh/config and use gpu"
part=''
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
        '' | [-.]* | *@-* | *[!A-Za-z0-9@._:%+-]*) die 2 "not a host: '$host'; $config" ;;
        *:*:*) ;; # an IPv6 address
        *:*) die 2 "not a host: '$host'; $config" ;;
    esac
    ulimit -f 4194304 2>/dev/null # blocks: an endless answer must not fill the disk
    tmp=$(mktemp -d /tmp/remote.XXXXXX) || exit 1 # a short path: that of a socket may have some 100 characters
    trap '[ ! -S "$tmp/socket" ] || ssh -o ControlPath="$tmp/socket" -O exit -- "$host" 2>/dev/null
        rm -rf "$tmp" "$part"' EXIT
    trap 'exit 129' HUP && trap 'exit 130' INT && trap 'exit 143' TERM
    cat >"$tmp/ssh" <<END
shift # the name that rsync gives the host
exec ssh -aTx -o BatchMode=yes -o StrictHostKeyChecking=accept-new -o ClearAllForwardings=yes -o RemoteCommand=none \\
    -o ConnectTimeout=15 -o ServerAliveInterval=15 -o ControlMaster=auto -o ControlPersist=30 \\
    -o ControlPath=$tmp/socket -- '$host' "\$@" 2>>$tmp/errors
END
    sed -n '/^# --- the far side/,/^# --- the call/p' "$0" >"$tmp/functions"
    : >"$tmp/errors"
}

# far FUNCTION ARGUMENT...: call one of the functions below on the far side. They, the arguments in quotes, and then
# this function's own standard input go over one pipe: no name is ever part of a command line there. Its answer comes
# after the marker; without one nothing was run, whatever the status of ssh.
far() {
    {
        echo "echo; echo '$marker'" && cat "$tmp/functions"
        [ "$1" != prepare ] || echo "mkdir -p -m 700 $base"
        echo "cd $base 2>/dev/null || { echo 'not deployed' && exit 7; }"
        for word; do # the x keeps a newline at the end
            case $word in *\'*) word=$(printf %sx "$word" | sed "s/'/'\\\\''/g") && word=${word%x} ;; esac
            printf "'%s' " "$word"
        done
    } >"$tmp/program"
    rm -f "$tmp/answered" && : >"$tmp/greeting"
    { wc -c <"$tmp/program" && cat "$tmp/program" -; } 2>/dev/null | {
        sh "$tmp/ssh" far "exec sh -c 'read -r n; eval \"\$(dd bs=\$n count=1 iflag=fullblock 2>/dev/null)\"'"
        echo $? >"$tmp/status"
    } | (
        while IFS= read -r line || [ -n "$line" ]; do
            [ "$line" != "$marker" ] || { : >"$tmp/answered" && exec cat; }
            [ -z "$line" ] || printf '%s\n' "$line" >>"$tmp/greeting"
        done
    )
    read -r status <"$tmp/status"
    {
        cat "$tmp/errors"
        [ -e "$tmp/answered" ] || {
            [ "$status" -eq 255 ] || echo "remote.sh: $host did not run the command (status $status), but answered:"
            cat "$tmp/greeting"
            ! grep -q 'Permission denied ([a-z]' "$tmp/errors" ||
                echo "remote.sh: the login must need no password: \`ssh-copy-id $host\` installs your key there"
        }
    } | head -c 20000 | shown >&2
    : >"$tmp/errors"
    [ -e "$tmp/answered" ] || return 255
    return "$status"
}

# upload NAME FOLDER ITEM...: copy these items of FOLDER, and set `there` to their folder on the far side. It is named
# after a checksum of the content: versions never mix, a second deploy finds what has arrived, a run keeps its own.
upload() {
    name=$(plain "$1") folder=$2
    shift 2
    # shellcheck disable=SC2086 # a command and its options
    (cd -- "$folder" && find -L "$@" -type f -exec $sha256 {} +) >"$tmp/found" ||
        echo "remote.sh: unreadable files are skipped" >&2
    [ -s "$tmp/found" ] || die 2 "there is no file to read in $folder"
    sort "$tmp/found" >"$tmp/manifest"
    there=data/$name-$($sha256 <"$tmp/manifest" | cut -c 1-12)
    for way in none -rLt -rLtc tar; do
        case $way in
            -*)
                [ -s "$tmp/greeting" ] || ! command -v rsync >/dev/null && continue # a greeting confuses it
                (cd -- "$folder" && rsync "$way" -e "sh $tmp/ssh" "$@" "far:$base/$there/") ;;
            tar) (cd -- "$folder" && tar -c -h -f - "$@") | far unpack "$there" ;;
        esac
        far verify "$there" <"$tmp/manifest" >"$tmp/wrong" && return
        status=$?
        [ "$status" -eq 8 ] || exit "$status"
    done
    die 1 "incomplete or damaged after transfer: $(head -n 20 "$tmp/wrong")"
}

deploy() { # ARGUMENT... of train.py
    python=$(far prepare "${PYTHON-}" </dev/null) || exit
    here=$(dirname -- "$0")
    upload scripts "$here" ./emotions.py ./stats.py ./check_data.py ./train.py ./remote.sh ./requirements.txt
    scripts=$there previous='' directory='' out='' prefix=''
    case " $* " in *' --predict'[\ =]*) prefix=predict- ;; esac
    for argument; do
        shift
        there=$argument
        case $argument in
            --out=*) out=${argument#*=} ;;
            --labels=* | --predict=*) send "${argument#*=}" && there=${argument%%=*}=$there ;;
            -*) ;;
            *) case $previous in
                --out) out=$argument ;;
                --labels | --predict) send "$argument" ;;
                --adapt) case $argument in all | [0-9]*) ;; *) send "$argument" && directory=$there ;; esac ;;
                '' | [!-]* | -[0-9]* | --*=* | --transpose | --nan-to-zero | --no-versions | --layers | --new-speakers | \
                    --fresh | --overwrite | --no-compile-cache | --recompute-stats | --require-gpu)
                    send "$argument" && directory=$there ;;
            esac ;;
        esac
        set -- "$@" "$there"
        previous=$argument
    done
    [ -n "$directory" ] || die 2 "deploy needs DIR, the folder of the features"
    far start "$python" "$scripts" "$directory" "${out:-runs/$prefix$(basename -- "$directory")}" "$@" </dev/null
}

send() { # PATH of a folder or file that train.py reads; if it is here, copy it and set `there`
    there=$1
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
        far report </dev/null >"$tmp/answer"
        status=$?
        [ "$status" -ne 255 ] || echo unreachable >"$tmp/answer"
        shown <"$tmp/answer" >"$tmp/report"
        grep -v -x -F -f "$tmp/seen" "$tmp/report"
        case ${1-}:$status in -f:[345]) sleep 2 && cp "$tmp/report" "$tmp/seen" ;; *) exit "$status" ;; esac
    done
}

# download [DEST]: HOST is not trusted. Its answer is a header and then bytes, so there is no archive to unpack: only
# files of the list below are made, in a new folder, and they are moved to DEST when all of them are whole.
download() {
    far pack </dev/null >"$tmp/answer" || exit
    sed '/^$/q' "$tmp/answer" >"$tmp/header"
    offset=$(($(wc -c <"$tmp/header")))
    dest=${1:-runs/$host/$(plain "$(sed -n 1p "$tmp/header")")}
    case $dest in /*) ;; *) dest=./$dest ;; esac
    [ -e "$dest/manifest.sha256" ] || [ -z "$(ls -A -- "$dest" 2>/dev/null)" ] ||
        die 2 "$dest contains other files; choose another folder"
    mkdir -p -- "${dest%/*}/" && part=$(mktemp -d "${dest%/}.XXXXXX") || exit 1
    for name in $artifacts; do
        entry=$(sed -n "s/^\([0-9a-f]\{64\} [0-9]\{1,10\}\) $name\$/\1/p" "$tmp/header" | head -n 1)
        [ -n "$entry" ] || continue
        sum=${entry% *} size=${entry#* }
        tail -c "+$((offset + 1))" "$tmp/answer" | head -c "$size" >"$part/$name"
        case $($sha256 <"$part/$name") in "$sum "*) ;; *) die 1 "incomplete or damaged after transfer: $name" ;; esac
        echo "$sum  $name" >>"$part/manifest.sha256"
        offset=$((offset + size))
    done
    [ -e "$part/manifest.sha256" ] || die 1 "the run has no results yet"
    mkdir -p -- "$dest" && mv -f -- "$part/manifest.sha256" "$dest/" && mv -f -- "$part"/* "$dest/" || exit 1
    printf '%s\n' "verified in $dest:" "$(cut -c 67- "$dest/manifest.sha256")" | shown
}

remove() {
    far erase </dev/null >"$tmp/answer" || exit
    shown <"$tmp/answer"
    printf 'Remove all of this from %s? [y/N] ' "$host" && read -r answer
    case $answer in [Yy]*) far erase yes </dev/null ;; *) die 1 "nothing was removed" ;; esac
}

# --- the far side: functions that run there, in the folder that deploy makes ------------------------------------------

umask 077
artifacts='config.json history.csv predictions.csv confusion.csv skipped.csv fusion.npz model.npz report.html
    metrics.json wav2vec_mean.npy wav2vec_std.npy train.log remote.log'

plain() { # TEXT as the name of a folder
    printf %s "$1" | tr -c 'A-Za-z0-9._-' _ | sed 's/^[.-]/_/' | cut -c 1-100
}

locked() { # by the launcher and the programs it starts: it falls with the last of them, however that ends
    [ -e lock ] && ! flock -s -n lock true
}

busy() {
    echo "a run is active there (remote.sh stop ends it): nothing was changed" >&2
    exit 3
}

prepare() { # PYTHON or nothing; print the Python to use. What is needed there is checked before anything is copied
    for tool in flock setsid sha256sum tar awk; do
        command -v "$tool" >/dev/null || { echo "$tool is needed on HOST" >&2 && exit 1; }
    done
    ! locked || busy
    [ -n "$1" ] || set -- "$(cat venv/python 2>/dev/null)" python3 python3.14 python3.13 python3.12 python3.11
    for name; do
        "$name" -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo "$name" && return
    done
    echo "Python 3.11 or newer with venv is needed on HOST; PYTHON=NAME names another than $*" >&2
    exit 1
}

verify() { # FOLDER; the manifest is standard input
    mkdir -p "$1" && cd "$1" && wrong=$(sha256sum -c 2>&1) && return
    printf '%s\n' "$wrong" | grep -v ': OK$'
    exit 8
}

unpack() { # FOLDER; the archive is standard input
    mkdir -p "$1" && cd "$1" && tar -x -o -f -
}

start() { # PYTHON SCRIPTS DIR OUT ARGUMENT... of train.py
    [ -e "$3" ] || { echo "DIR exists neither here nor on HOST" >&2 && exit 2; }
    exec 9>>lock
    flock -n 9 || { sleep 1 && flock -n 9; } || busy # a monitor that looks holds it for an instant
    mkdir -p -- "$4" && ln -sfn -- "$4" current || exit 1
    [ ! -e status ] || mv status status.last
    rm -f group
    echo set-up >step && date >started
    python=$1 scripts=$2 out=$4
    shift 4
    set -- "$scripts/remote.sh" launch "$python" "$scripts" "$@" --out "$out"
    setsid nohup sh "$@" </dev/null >>current/remote.log 2>&1 &
    echo started # with a session of its own and no stream of the connection, it outlives that
}

launch() { # PYTHON SCRIPTS ARGUMENT... of train.py; the lock is on descriptor 9
    python=$1 scripts=$2
    shift 2
    ! gpu | grep -q ',.*,.*,' || set -- --require-gpu "$@" # a row of four fields is a GPU, all else a reason
    echo "== $(date): train.py $*" && echo $$ >pid && echo $$ >group
    [ "$python" = "$(cat venv/python 2>/dev/null || echo "$python")" ] || rm -rf venv
    cmp -s "$scripts/requirements.txt" venv/requirements.txt || { # copied there last: these are installed
        "$python" -m venv venv && venv/bin/python -m pip install -r "$scripts/requirements.txt" &&
            echo "$python" >venv/python && cp "$scripts/requirements.txt" venv/
    } && {
        echo training >step
        venv/bin/python -u "$scripts/train.py" "$@" &
        echo $! >pid
        wait $!
    }
    echo $? >status.new && mv status.new status
}

stop() { # the run and all it has started: one process group, whose number is its own while the lock is held
    locked || { echo "no run is active there" && return; }
    group=$(cat group) && kill -s TERM -- "-$group" || exit 1
    tries=0
    while locked; do
        [ "$tries" -ne 100 ] || kill -s KILL -- "-$group" || exit 1
        sleep 0.1 && tries=$((tries + 1))
    done
    echo "stopped: the same deploy resumes it"
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
    lines=$({
        for word in device: epoch; do ! fresh train.log || sed -n "/^$word /p" current/train.log | tail -n 1; done
        # that of an earlier start is shown only where the run was finished already
        { [ "$status" -ne 0 ] && ! fresh metrics.json; } || [ ! -e current/metrics.json ] ||
            sed -n 's/^  "\(ua\|wa\|macro_f1\|chance_ua\)": \([0-9]*\.[0-9]\{1,4\}\).*/\1 \2/p' current/metrics.json
        tail -c 20000 current/remote.log | tail -n 10 | cut -c 1-300
    } | tr '\000' '?')
    printf '%s\n' "$lines"
    ! printf '%s\n' "$lines" | grep -E -q 'GPU COULD NOT BE USED.*([Ll]oad|[Ll]ibrar|\.so|symbol)' ||
        echo "hint: unset LD_LIBRARY_PATH on HOST, then deploy again: jax brings its own CUDA libraries"
    exit "$status"
}

# pack: print the name of the run, for each file its checksum, size and name, an empty line, and then the files. They
# are copied first, because a run goes on writing.
pack() {
    cd current 2>/dev/null || { echo "no run was started there" >&2 && exit 7; }
    copies=$(mktemp -d) || exit 1
    trap 'rm -rf "$copies"' EXIT
    run=$(pwd -P) && plain "${run##*/}"
    for name in $artifacts; do
        [ -f "$name" ] || continue
        cp "$name" "$copies/" && sum=$(sha256sum <"$copies/$name") || exit 1
        echo "${sum%% *} $(($(wc -c <"$copies/$name"))) $name"
        set -- "$@" "$copies/$name"
    done
    echo && cat "$@" </dev/null
}

erase() { # [yes]: remove, or only list, what deploy has made here; whatever else there is stays, and the folder with it
    exec 9>>lock
    flock -n 9 || busy
    [ $# -gt 0 ] || { pwd -P && du -sh -- data/*-???????????? runs/* venv 2>/dev/null; exit 0; }
    rm -rf -- data/*-???????????? runs/* venv current group pid started status status.* step lock || exit 1
    rmdir data runs 2>/dev/null
    [ -z "$(ls -A)" ] || { echo "removed, except:" && ls -A && exit; }
    rmdir -- "$PWD" 2>/dev/null # not if it is a link
    echo removed
}

# --- the call -------------------------------------------------------------------------------------------------------

usage() {
    sed -n '2,/^$/s/^# \{0,1\}//p' "$0"
}

[ "${1-}" != launch ] || { shift && launch "$@" && exit; } # by start, on the far side
for argument; do
    case $argument in
        -h | --help) usage && exit ;;
        -[!-0-9f]*) die 2 "no option of ssh is taken here: $argument; $config" ;;
    esac
done
case $#:${1-}:${3-} in
    [3-9]:deploy:* | [1-9][0-9]*:deploy:* | 2:monitor: | 3:monitor:-f | [23]:download:* | 2:remove:)
        command=$1 host=$2
        shift 2
        connect && "$command" "$@" ;;
    2:stop:) host=$2 && connect && far stop </dev/null ;;
    *) usage >&2 && die 2 "wrong arguments: ${*:-none}" ;;
esac
