# bash completion of cachix-workspace, made by tools/manuals.py
_cachix_workspace() {
  local cur=${COMP_WORDS[COMP_CWORD]} prev=${COMP_WORDS[COMP_CWORD-1]} path= word i
  # bash splits --option=value into three words
  if [[ $cur == = ]]; then cur=; elif [[ $prev == = ]]; then
    prev=${COMP_WORDS[COMP_CWORD-2]}
  fi
  COMPREPLY=()
  case $prev in
    --data) compopt -o filenames; COMPREPLY=($(compgen -d -- "$cur")); return ;;
    --database) :; return ;;
    --database-file) compopt -o filenames; COMPREPLY=($(compgen -f -- "$cur")); return ;;
    --to) :; return ;;
    --url) :; return ;;
    --token-file) compopt -o filenames; COMPREPLY=($(compgen -f -- "$cur")); return ;;
    --listen) :; return ;;
    --public-url) :; return ;;
    --also-known-as) :; return ;;
    --behind-proxy) :; return ;;
    --auth-header) :; return ;;
    --certificate) compopt -o filenames; COMPREPLY=($(compgen -f -- "$cur")); return ;;
    --key) compopt -o filenames; COMPREPLY=($(compgen -f -- "$cur")); return ;;
    --max-connections) :; return ;;
    --max-per-address) :; return ;;
    --max-nar) :; return ;;
    --cache-directory) compopt -o filenames; COMPREPLY=($(compgen -d -- "$cur")); return ;;
    --cache-store) :; return ;;
    --keep-free) :; return ;;
    --max-log) :; return ;;
    --keep-deployments) :; return ;;
    --keep-days) :; return ;;
    --description) :; return ;;
    --expires) :; return ;;
    --name) :; return ;;
    --names) :; return ;;
    --count) :; return ;;
    --agents) :; return ;;
    --out) compopt -o filenames; COMPREPLY=($(compgen -f -- "$cur")); return ;;
    --names-from) compopt -o filenames; COMPREPLY=($(compgen -f -- "$cur")); return ;;
    --out-dir) compopt -o filenames; COMPREPLY=($(compgen -d -- "$cur")); return ;;
    --cache) :; return ;;
    --role) COMPREPLY=($(compgen -W "viewer operator admin" -- "$cur")); return ;;
    --agent) :; return ;;
    --format) COMPREPLY=($(compgen -W "json slack ntfy" -- "$cur")); return ;;
    --events) :; return ;;
    --label) :; return ;;
    --state) :; return ;;
    --limit) :; return ;;
  esac
  for ((i = 1; i < COMP_CWORD; i++)); do
    word=${path:+$path }${COMP_WORDS[i]}
    case $word in "agent"|"agent label"|"agent list"|"agent move"|"agent pause"|"agent remove"|"agent rename"|"agent resume"|"agent show"|"audit"|"backup"|"cache"|"cache create"|"cache gc"|"cache key"|"cache key retire"|"cache key rotate"|"cache list"|"cache pin"|"cache show"|"cache unpin"|"deployment"|"deployment cancel"|"deployment list"|"deployment log"|"deployment retry"|"deployment show"|"freeze"|"init"|"login-link"|"migrate-database"|"person"|"person add"|"person link"|"person list"|"person remove"|"person role"|"prune"|"restore"|"run"|"run list"|"run retry"|"run rollback"|"run show"|"serve"|"thaw"|"token"|"token create"|"token create activate"|"token create admin"|"token create agent"|"token create metrics"|"token list"|"token revoke"|"token rotate"|"webhook"|"webhook add"|"webhook list"|"webhook remove"|"webhook test") path=$word ;; esac
  done
  local words= files=
  case $path in
    "") words="serve init login-link person token agent deployment run freeze thaw webhook cache audit prune backup restore migrate-database --help --version" ;;
    "agent") words="list move show pause resume remove rename label" ;;
    "agent label") words="--data= --json --token-file= --url=" ;;
    "agent list") words="--data= --json --label= --state= --token-file= --url=" ;;
    "agent move") words="--data= --token-file= --url=" ;;
    "agent pause") words="--data= --json --token-file= --url=" ;;
    "agent remove") words="--data= --json --token-file= --url=" ;;
    "agent rename") words="--data= --json --token-file= --url=" ;;
    "agent resume") words="--data= --json --token-file= --url=" ;;
    "agent show") words="--data= --json --token-file= --url=" ;;
    "audit") words="--data= --json --limit= --token-file= --url=" ;;
    "backup") words="--data=" ;;
    "cache") words="list create show key gc pin unpin" ;;
    "cache create") words="--data= --out= --private --public-url= --token-file= --url=" ;;
    "cache gc") words="--data= --dry-run --json --keep-days= --keep-deployments= --token-file= --url=" ;;
    "cache key") words="rotate retire" ;;
    "cache key retire") words="--data= --out= --token-file= --url=" ;;
    "cache key rotate") words="--data= --out= --token-file= --url=" ;;
    "cache list") words="--data= --json --token-file= --url=" ;;
    "cache pin") words="--data= --token-file= --url=" files=1 ;;
    "cache show") words="--data= --json --token-file= --url=" ;;
    "cache unpin") words="--data= --token-file= --url=" files=1 ;;
    "deployment") words="list show log retry cancel" ;;
    "deployment cancel") words="--data= --json --token-file= --url=" ;;
    "deployment list") words="--agent= --data= --json --limit= --token-file= --url=" ;;
    "deployment log") words="--data= --json --token-file= --url=" ;;
    "deployment retry") words="--data= --json --token-file= --url=" ;;
    "deployment show") words="--data= --json --token-file= --url=" ;;
    "freeze") words="--data= --token-file= --url=" ;;
    "init") words="--data= --database= --database-file=" ;;
    "login-link") words="--data= --token-file= --url=" ;;
    "migrate-database") words="--data= --database-file= --to=" ;;
    "person") words="list add link remove role" ;;
    "person add") words="--data= --role= --token-file= --url=" ;;
    "person link") words="--data= --token-file= --url=" ;;
    "person list") words="--data= --json --token-file= --url=" ;;
    "person remove") words="--data= --token-file= --url=" ;;
    "person role") words="--data= --token-file= --url=" ;;
    "prune") words="--data= --dry-run --keep-days= --keep-deployments=" ;;
    "restore") words="--data= --database= --database-file=" ;;
    "run") words="list show retry rollback" ;;
    "run list") words="--data= --json --limit= --token-file= --url=" ;;
    "run retry") words="--data= --json --token-file= --url=" ;;
    "run rollback") words="--data= --json --token-file= --url= --yes" ;;
    "run show") words="--data= --json --token-file= --url=" ;;
    "serve") words="--also-known-as= --auth-header= --behind-proxy= --cache-directory= --cache-shared --cache-store= --certificate= --data= --database= --database-file= --keep-days= --keep-deployments= --keep-free= --key= --listen= --max-connections= --max-log= --max-nar= --max-per-address= --public-url=" ;;
    "thaw") words="--data= --token-file= --url=" ;;
    "token") words="create list rotate revoke" ;;
    "token create") words="agent activate admin metrics" ;;
    "token create activate") words="--agents= --cache= --count= --data= --description= --expires= --name= --names= --names-from= --out= --out-dir= --shared --token-file= --url=" ;;
    "token create admin") words="--agents= --cache= --count= --data= --description= --expires= --name= --names= --names-from= --out= --out-dir= --shared --token-file= --url=" ;;
    "token create agent") words="--agents= --cache= --count= --data= --description= --expires= --name= --names= --names-from= --out= --out-dir= --shared --token-file= --url=" ;;
    "token create metrics") words="--agents= --cache= --count= --data= --description= --expires= --name= --names= --names-from= --out= --out-dir= --shared --token-file= --url=" ;;
    "token list") words="--data= --json --token-file= --url=" ;;
    "token revoke") words="--and-agents --data= --token-file= --url=" ;;
    "token rotate") words="--data= --out= --token-file= --url=" ;;
    "webhook") words="list add test remove" ;;
    "webhook add") words="--data= --events= --format= --label= --token-file= --url=" ;;
    "webhook list") words="--data= --json --token-file= --url=" ;;
    "webhook remove") words="--data= --token-file= --url=" ;;
    "webhook test") words="--data= --token-file= --url=" ;;
  esac
  COMPREPLY=($(compgen -W "$words" -- "$cur"))
  [[ ${#COMPREPLY[@]} == 1 && ${COMPREPLY[0]} == *= ]] && compopt -o nospace
  if [[ $files && $cur != -* ]]; then
    compopt -o filenames; COMPREPLY+=($(compgen -f -- "$cur"))
  fi
  return 0
}
complete -F _cachix_workspace cachix-workspace
